"""The loader: the same stream of packs whatever happens, and a clear end where it cannot go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.index import find_shards, index_path, read_index, write_index
from data_pipeline.loader import PackedLoader
from data_pipeline.plan import Position
from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.media import encoded, pattern

SEQ_LENGTH = 512


def loader(config: DataConfig, *, batch: int = 4, rank: int = 0, ranks: int = 1, seq_length: int = SEQ_LENGTH):
    return PackedLoader(
        config, seq_length=seq_length, global_batch_size=batch, data_parallel_rank=rank, data_parallel_size=ranks
    )


def digest(batch: Batch) -> tuple[list[str], str]:
    """Sample ids, and a checksum of every byte of the pack."""
    content = hashlib.sha256(json.dumps([batch.segment_domains, batch.rejected]).encode())
    for name, value in sorted(vars(batch).items()):
        if isinstance(value, torch.Tensor):
            content.update(name.encode() + str(value.shape).encode() + value.numpy().tobytes())
    return batch.sample_ids, content.hexdigest()


def stream(config: DataConfig, steps: int, state: dict | None = None, **options) -> list[list[tuple[list[str], str]]]:
    packed = loader(config, **options)
    if state is not None:
        packed.load_state_dict(json.loads(json.dumps(state)))
    taken = [[digest(batch) for batch in packed.next_step()] for _ in range(steps)]
    packed.close()
    return taken


def take(packed: PackedLoader, steps: int) -> list[Batch]:
    return [batch for _ in range(steps) for batch in packed.next_step()]


@pytest.mark.fast
def test_the_expected_work_is_that_of_the_first_window(data_config):
    packed = loader(data_config, batch=1)
    lengths, patches = packed.expected_work()
    packs, _ = packed.plan.window(Position.start(len(packed.sources)))
    batches = take(packed, len(packs))
    packed.close()
    assert sorted(lengths) == sorted(n for batch in batches for n in batch.segment_lengths.tolist() if n)
    assert sorted(patches) == sorted(n for batch in batches for n in batch.grid_thw.prod(dim=1).tolist())


@pytest.mark.fast
def test_batches_hold_what_they_say(data_config):
    packed = loader(data_config)
    seen: set[str] = set()
    for _ in range(12):
        for batch in packed.next_step():
            assert batch.input_ids.shape == batch.labels.shape == batch.loss_mask.shape == (SEQ_LENGTH,)
            assert batch.position_ids.shape == (3, SEQ_LENGTH)
            boundaries, lengths = batch.cu_seqlens.tolist(), batch.segment_lengths.tolist()
            assert (boundaries[0], boundaries[-1]) == (0, SEQ_LENGTH)
            assert len(boundaries) - 1 == len(lengths) == len(batch.segment_domains) == len(batch.sample_ids)
            assert len(batch.pixels) == (batch.grid_thw.prod(dim=1) * batch.frames).sum()
            assert (batch.input_ids == packed.tokenizer.image_id).sum() * 4 == batch.num_patches
            assert not batch.rejected
            for start, end, length in zip(boundaries[:-1], boundaries[1:], lengths, strict=True):
                assert start % 8 == 0
                assert length <= end - start
                useful = slice(start, start + length)
                assert batch.labels[useful][:-1].equal(batch.input_ids[useful][1:])
                assert not batch.loss_mask[max(start + length - 1, start) : end].any()
                if length:
                    assert batch.position_ids[:, start].tolist() == [0, 0, 0]
            learned = batch.labels[batch.loss_mask.bool()]
            assert not torch.isin(learned, torch.tensor([10, 11, 12, 13, 34, 35])).any()
            seen.update(batch.segment_domains)
    assert seen == {"image_text", "interleaved", "ocr", "grounding", "video", "text", "chat", ""}


def test_going_on_from_every_step_gives_the_same_stream(data_config):
    """Ids and bytes, over more than a window and an epoch, through JSON as a checkpoint stores it."""
    packed = loader(data_config)
    states, expected = [packed.state_dict()], []
    for _ in range(24):
        expected.append([digest(batch) for batch in packed.next_step()])
        states.append(packed.state_dict())
    assert packed.state_dict()["position"]["drawn"] != [0, 0]
    for step in range(24):
        assert stream(data_config, 1, states[step]) == expected[step : step + 1]
    assert stream(data_config, 10, states[14]) == expected[14:]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_step_is_the_same_for_every_layout(data_config, ranks, workers):
    whole = stream(data_config, 6)
    config = replace(data_config, num_workers=workers)
    parts = [stream(config, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(6):
        assert [parts[pack % ranks][step][pack // ranks] for pack in range(4)] == whole[step]


def test_a_state_taken_on_two_ranks_with_workers_goes_on_on_one_without(data_config):
    packed = loader(replace(data_config, num_workers=2), rank=1, ranks=2)
    for _ in range(3):
        packed.next_step()
    state = packed.state_dict()
    packed.close()
    assert stream(data_config, 3, state) == stream(data_config, 6)[3:]


def test_a_loader_goes_back_and_forth(data_config):
    packed = loader(replace(data_config, num_workers=2))
    start = packed.state_dict()
    first = [digest(batch) for batch in packed.next_step()]
    second = [digest(batch) for batch in packed.next_step()]
    packed.load_state_dict(start)
    assert [digest(batch) for batch in packed.next_step()] == first
    packed.close()
    assert [digest(batch) for batch in packed.next_step()] == second
    packed.close()


@pytest.mark.fast
def test_the_training_process_draws_the_same_random_numbers(data_config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader(data_config).next_step()
    assert torch.rand(3).equal(expected)


def test_closing_leaves_no_process_behind(data_config):
    packed = loader(replace(data_config, num_workers=2))
    packed.next_step()
    workers = [worker.pid for worker in packed._batches._workers]
    packed.close()
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_not_a_hang(data_config):
    packed = loader(replace(data_config, num_workers=1))
    packed.next_step()
    os.kill(packed._batches._workers[0].pid, signal.SIGKILL)
    time.sleep(0.5)  # the death itself must not be thrown into whatever runs now
    with pytest.raises(DataError, match=r"a data worker died .*exited unexpectedly.*data.num_workers=0"):
        take(packed, 20)


@pytest.fixture
def own_shards(shard_folders, tmp_path, data_config) -> tuple[Path, DataConfig]:
    """A copy of the small source that a test may damage."""
    folder = Path(shutil.copytree(shard_folders[1], tmp_path / "shards"))
    return folder, replace(data_config, sources=[SourceConfig(str(folder))])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_leave_padding_and_a_reason(own_shards, workers):
    """One sample's bytes are changed on disk, elsewhere than where the index would notice it at the start."""
    folder, config = own_shards
    clean = loader(config)
    wanted = take(clean, 10)
    # The fingerprint covers both ends of a file; these files are small, so their index is told to accept the change.
    victim = next(shard for shard in find_shards(str(folder)) if read_index(shard).sample(0).members[1:])
    sample = read_index(victim).sample(0)
    with open(victim, "r+b") as file:
        file.seek(sample.members[1].offset + 40)
        file.write(bytes(200))
    accept(victim)

    damaged = loader(replace(config, num_workers=workers))
    met = 0
    for batch, before in zip(take(damaged, 10), wanted, strict=True):
        name = f"{victim.name}/{sample.key}"
        lost = before.sample_ids.count(name)
        met += lost
        assert [sample_id for sample_id in before.sample_ids if sample_id not in ("", name)] == [
            sample_id for sample_id in batch.sample_ids if sample_id
        ]
        reasons = [(entry["reason"], entry["shard"], entry["key"]) for entry in batch.rejected]
        assert reasons == [("checksum", victim.name, sample.key)] * lost
    damaged.close()
    assert met


def accept(shard: Path) -> None:
    """Rewrites an index's header for the shard's present ends; rows stay as they are."""
    index = read_index_without_check(shard)
    header = json.loads(index.schema.metadata[b"header"])
    write_index(shard, index.to_pylist(), tokenizer_hash=header["tokenizer_hash"], chat_form=header["chat_form"])


def read_index_without_check(shard: Path):
    with pa.OSFile(str(index_path(shard))) as file:
        return pa.ipc.open_file(file).read_all()


@pytest.mark.fast
def test_samples_too_long_for_the_sequence_are_counted(tmp_path, tokenizer, data_config):
    records = tmp_path / "records.jsonl"
    (tmp_path / "a.png").write_bytes(encoded(pattern(400, 400), "PNG"))
    lines = [{"domain": "image_text", "text": "x", "images": ["a.png"]}]
    lines += [{"domain": "text", "text": f"short text {number}"} for number in range(5)]
    lines += [{"domain": "text", "text": "a long text. " * 200}]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_shards([records], tmp_path / "out", tokenizer=tokenizer.folder)
    config = replace(data_config, sources=[SourceConfig(str(tmp_path / "out"))], image_max_tokens=6144)
    packed = loader(config, seq_length=128, batch=16)
    batches = take(packed, 4)
    rejected = [entry for batch in batches for entry in batch.rejected]
    assert rejected
    assert {(entry["reason"], entry["key"]) for entry in rejected} == {("too_long", "00000-000000")}
    assert "tokens do not fit train.seq_length 128" in rejected[0]["detail"]
    pieces = [
        batch.segment_lengths[place].item()
        for batch in batches
        for place, name in enumerate(batch.sample_ids)
        if name == "shard-00000-00000.tar/00000-000006"
    ]
    length = int(packed.sources[0].lengths[6])
    assert set(pieces) == {128, length % 128}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_disappears_stops_the_run(own_shards, workers):
    folder, config = own_shards
    packed = loader(replace(config, num_workers=workers))
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"shard .*shard-00000-0000\d.tar cannot be opened \(No such file.*restore it"
    ) as caught:
        take(packed, 5)
    assert "Traceback" not in str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"seed": 9},
            "data.seed has changed from 0 to 9 since the checkpoint: undo it, or set checkpoint.allow_changes",
        ),
        ({"segment_multiple": 16}, "data.segment_multiple has changed"),
        ({"image_max_tokens": 20}, "the samples of source 'big', or the pixel budgets, have changed"),
    ],
)
def test_a_changed_plan_is_named(data_config, changes, says):
    state = loader(data_config).state_dict()
    with pytest.raises(DataError, match=says):
        loader(replace(data_config, **changes)).load_state_dict(state)


@pytest.mark.fast
def test_changed_sources_go_on_by_name_if_allowed(data_config):
    packed = loader(data_config)
    take(packed, 40)
    state = packed.state_dict()
    big, small = data_config.sources
    changed = loader(replace(data_config, sources=[small, replace(big, name="other")]))
    with pytest.raises(DataError, match=r"data.sources\[\].weight has changed|data.sources has changed"):
        changed.load_state_dict(state)
    changed.load_state_dict(state, allow_changes=True)
    assert changed.state_dict()["position"] == {
        "drawn": (state["position"]["drawn"][1], 0),
        "tokens": (0, 0),
        "packs": 0,
    }
    assert changed.next_step()


@pytest.mark.fast
def test_a_batch_that_the_ranks_do_not_divide(data_config):
    with pytest.raises(DataError, match=r"train\.global_batch_size 4 is not a multiple of the data-parallel size 3"):
        loader(data_config, ranks=3)
