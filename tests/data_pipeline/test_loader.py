"""The loader: the same stream of packs whatever happens, and a clear end where it cannot go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.catalogue import find_shards
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.cost import PackCost
from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.errors import DataError
from data_pipeline.index import read_index
from data_pipeline.loader import PackedLoader
from data_pipeline.plan import Position
from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.media import encoded, pattern

SEQ_LENGTH = 512
# Forks of a process without threads: a fork of this one, in which other tests have left some, may wait for ever.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([__name__])


def loader(config: DataConfig, *, batch: int = 4, rank: int = 0, ranks: int = 1, seq_length: int = SEQ_LENGTH):
    return PackedLoader(
        config,
        seq_length=seq_length,
        global_batch_size=batch,
        cost=PackCost(token=1000, token_squared=1, patch=100, patch_squared=1),
        data_parallel_rank=rank,
        data_parallel_size=ranks,
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
    steps, _ = packed.plan.window(Position.start(len(packed.sources)))
    mixture = packed.planned_mixture()
    batches = take(packed, len(steps))
    packed.close()
    tokens: Counter[str] = Counter()
    for batch in batches:
        for domain, length in zip(batch.segment_domains, batch.segment_lengths.tolist(), strict=True):
            tokens[domain] += length
    assert {domain: share.tokens for domain, share in mixture.items()} == +tokens
    assert sorted(lengths) == sorted(n for batch in batches for n in batch.segment_lengths.tolist() if n)
    assert sorted(patches) == sorted(n for batch in batches for n in batch.grid_thw.prod(dim=1).tolist())


@pytest.mark.fast
def test_steps_that_are_skipped_are_as_if_they_had_been_taken(data_config):
    packed, other = loader(data_config), loader(data_config)
    take(packed, 3)
    other.skip(1)
    other.skip(2)
    assert other.state_dict() == packed.state_dict()
    assert [digest(batch) for batch in other.next_step()] == [digest(batch) for batch in packed.next_step()]
    packed.close()
    other.close()


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
    for _ in range(44):
        expected.append([digest(batch) for batch in packed.next_step()])
        states.append(packed.state_dict())
    assert packed.state_dict()["position"]["places"][0][0] > 96  # samples drawn of the first source, which has 96
    for step in (*range(0, 30, 4), *range(30, 44)):
        assert stream(data_config, 1, states[step]) == expected[step : step + 1]
    assert stream(data_config, 14, states[30]) == expected[30:]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_step_is_the_same_for_every_layout(data_config, ranks, workers):
    whole = stream(data_config, 6)
    config = replace(data_config, num_workers=workers)
    parts = [stream(config, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(6):
        assert [parts[pack % ranks][step][pack // ranks] for pack in range(4)] == whole[step]


def run_until_killed(config: DataConfig, ranks: int, workers: int, state: dict | None, out: Path) -> None:
    """All ranks of a run in one process, which writes a line a step: the packs in their global order, and the state."""
    parts = [loader(replace(config, num_workers=workers), rank=rank, ranks=ranks) for rank in range(ranks)]
    for packed in parts:
        if state is not None:
            packed.load_state_dict(state)
    with open(out, "w") as file:
        while True:
            steps = [packed.next_step() for packed in parts]
            packs = [digest(steps[pack % ranks][pack // ranks]) for pack in range(4)]
            print(json.dumps({"packs": packs, "state": parts[0].state_dict()}), file=file, flush=True)


def test_killed_at_random_and_gone_on_with_other_ranks_and_workers(data_config, tmp_path):
    """kill -9 at six random moments; every run goes on from the last state that was written down."""
    rng = np.random.default_rng()  # any moment will do
    seen: list = []
    state = None
    for number, (ranks, workers) in enumerate([(1, 0), (2, 2), (4, 3), (1, 2), (2, 0), (4, 1)]):
        out = tmp_path / f"{number}.jsonl"
        run = FRESH.Process(target=run_until_killed, args=(data_config, ranks, workers, state, out))
        run.start()
        enough, deadline = int(rng.integers(1, 4)), time.monotonic() + 60
        while not out.exists() or out.read_text().count("\n") < enough:
            assert time.monotonic() < deadline
            assert run.is_alive()
            time.sleep(0.002)
        time.sleep(float(rng.random()) / 50)
        workers_left = psutil.Process(run.pid).children(recursive=True)
        run.kill()
        run.join()
        _, alive = psutil.wait_procs(workers_left, timeout=10)
        assert not alive, "workers die with their run, whatever they were doing"
        lines = [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
        seen += [line["packs"] for line in lines]
        state = lines[-1]["state"]
    assert seen == json.loads(json.dumps(stream(data_config, len(seen))))


@pytest.mark.fast
def test_the_state_of_eight_sources_is_less_than_a_kilobyte(data_config):
    """With names of usual length and counters of a run of a month."""
    big, _ = data_config.sources
    weights = {"caption_web": 0.3, "caption_synthetic": 0.1, "interleaved_web": 0.15, "interleaved_papers": 0.05,
               "ocr_synthetic": 0.1, "grounding_gui": 0.05, "video_caption": 0.05, "text_general": 0.2}  # fmt: skip
    config = replace(data_config, sources=[replace(big, name=name, weight=w) for name, w in weights.items()])
    state = loader(config).state_dict()
    state["position"]["places"] = [[3 * 10**9, 999, 3 * 10**12] for _ in state["position"]["places"]]
    state["tally"] = {"samples": 10**10, "reasons": {"checksum": 10**6, "unreadable_image": 10**6, "bad_record": 99}}
    assert len(json.dumps(state).encode()) < 1000
    again = loader(config)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert json.dumps(again.state_dict()) == json.dumps(state)


@pytest.mark.fast
def test_a_state_of_another_version_is_refused(data_config):
    state = loader(data_config).state_dict()
    with pytest.raises(DataError, match=r"written by another version .* model.init_from"):
        loader(data_config).load_state_dict({**state, "format": 1}, allow_changes=True)


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
    workers = worker_pids()
    packed.close()
    assert len(workers) == 2
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def worker_pids() -> list[int]:
    return [process.pid for process in psutil.Process().children() if process.name() == "pt_data_worker"]


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_not_a_hang(data_config):
    packed = loader(replace(data_config, num_workers=1))
    packed.next_step()
    os.kill(worker_pids()[0], signal.SIGKILL)
    time.sleep(0.5)  # the death itself must not be thrown into whatever runs now
    with pytest.raises(DataError, match=r"a data worker died .*\(.*look for a lack of memory.*data.num_workers=0"):
        take(packed, 20)


@pytest.mark.timeout(60)
def test_a_full_shared_memory_is_an_error_and_not_a_hang(data_config):
    """A limit of files does what a small /dev/shm does, which containers have by default."""
    packed = loader(replace(data_config, num_workers=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"no room in /dev/shm for a pack of .* MB \(.*--shm-size.*data\.prefetch"):
            take(packed, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(take(packed, 2)) == 8, "it goes on where it was"
    packed.close()


def test_a_step_of_many_packs_does_not_keep_files_open(data_config):
    packed = loader(replace(data_config, num_workers=2), batch=64, seq_length=256)
    packed.next_step()
    few = len(os.listdir("/proc/self/fd"))
    held = [packed.next_step() for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) < few + 64
    packed.close()
    assert sum(map(len, held)) == 3 * 64


@pytest.fixture
def own_shards(shard_folders, tmp_path, data_config) -> tuple[Path, DataConfig]:
    """A copy of the small source that a test may damage."""
    folder = Path(shutil.copytree(shard_folders[1], tmp_path / "shards"))
    return folder, replace(data_config, sources=[SourceConfig(str(folder))])


@pytest.mark.timeout(60)
def test_a_worker_that_dies_is_found_with_the_sample_it_was_at(own_shards):
    """At a shard that the first pack does not need. The kernel makes whoever opens it wait, and tells of it."""
    _, config = own_shards
    packed = loader(replace(config, num_workers=1), seq_length=128)
    [source] = packed.sources
    first, *later = (pack for step, _ in islice(packed.plan.steps(Position.start(1)), 32) for pack in step)
    needed, others = (
        {source.sample(piece.row).shard for pack in packs for piece in pack.pieces} for packs in ([first], later)
    )
    shard = Path(min(others - needed))

    def kill(*_: object) -> None:
        [worker] = worker_pids()
        os.kill(worker, signal.SIGKILL)

    before = signal.signal(signal.SIGIO, kill)
    descriptor = os.open(shard, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with pytest.raises(DataError, match=rf"a data worker died at {re.escape(shard.name)}/\d+-\d+ \("):
            take(packed, 32)
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def segments(batch: Batch, image_id: int) -> list[tuple[str, int, int, str]]:
    """What a pack holds, room by room: sample id, first token, tokens with padding, and a checksum of all of it."""
    bounds = batch.cu_seqlens.tolist()
    grids = iter(zip(batch.grid_thw.tolist(), batch.frames.tolist(), strict=True))
    rooms, slices = [], 0
    for place, (start, end) in enumerate(pairwise(bounds)):
        content = hashlib.sha256(batch.segment_domains[place].encode())
        for name in ("input_ids", "labels", "loss_mask", "position_ids"):
            content.update(getattr(batch, name)[..., start:end].contiguous().numpy().tobytes())
        tokens = int((batch.input_ids[start:end] == image_id).sum())
        while tokens:
            (_, h, w), frames = next(grids)
            content.update(batch.pixels[slices : slices + h * w * frames].numpy().tobytes())
            slices += h * w * frames
            tokens -= h * w // 4
        rooms.append((batch.sample_ids[place], start, end - start, content.hexdigest()))
    assert slices == len(batch.pixels)
    return rooms


def overwrite(shard: Path, key: str, member: int = 1) -> None:
    """Changes bytes in the middle of a file of a shard, as a bad disk does: tar and index know nothing of it."""
    index = read_index(shard)
    sample = next(s for s in map(index.sample, range(index.table.num_rows)) if s.key == key)
    with open(shard, "r+b") as file:
        file.seek(sample.members[member].offset + sample.members[member].size // 2)
        file.write(bytes(20))


def with_picture(shard: Path, nth: int = 0) -> str:
    """A sample of a shard that has a picture or clip."""
    index = read_index(shard)
    samples = [index.sample(row) for row in range(index.table.num_rows)]
    return [sample.key for sample in samples if len(sample.members) > 1][nth]


def assert_replaced(got: list[Batch], want: list[Batch], lost: dict[str, str], image_id: int) -> Counter[str]:
    """Every room holds what it held before, but those of the lost samples (id: reason), whose places others took, as
    the records say. Returns how often each was met."""
    met: Counter[str] = Counter()
    for batch, before in zip(got, want, strict=True):
        records = [(f"{r['shard']}/{r['key']}", r["reason"]) for r in batch.rejected]
        replaced_by = {record["replaced_by"] for record in batch.rejected}
        expected = []
        for now, then in zip(segments(batch, image_id), segments(before, image_id), strict=True):
            if then[0] in lost:
                assert now[1:3] == then[1:3]
                assert now[0] not in lost
                assert now[0] in replaced_by
                expected.append((then[0], lost[then[0]]))
                met[then[0]] += 1
            else:
                assert now == then
        assert [record for record in records if record in expected] == expected
        assert set(records) <= set(lost.items())  # a substitute may be a lost one too, and is recorded as well
    return met


@pytest.fixture(scope="module")
def one_batch_steps(shard_folders, tokenizer_folder):
    """The undamaged stream of the small source."""
    _, small = shard_folders
    config = DataConfig(
        tokenizer=str(tokenizer_folder),
        sources=[SourceConfig(str(small), name="shards")],
        num_workers=0,
        image_max_tokens=40,
        video_max_tokens=100,
    )
    packed = loader(config)
    return take(packed, 16), packed.tokenizer.image_id


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_lost_samples_are_replaced_and_nothing_else_changes(own_shards, one_batch_steps, workers, ranks):
    folder, config = own_shards
    wanted, image_id = one_batch_steps
    first, second, *_ = find_shards(str(folder))
    lost = {f"{first.name}/{with_picture(first)}": "checksum", f"{second.name}/{with_picture(second, 1)}": "checksum"}
    for name in lost:
        overwrite(folder / name.partition("/")[0], name.partition("/")[2])
    parts = [loader(replace(config, num_workers=workers), rank=rank, ranks=ranks) for rank in range(ranks)]
    got = []
    for _ in range(16):
        steps = [packed.next_step() for packed in parts]
        got += [steps[pack % ranks][pack // ranks] for pack in range(4)]
    for packed in parts:
        packed.close()
    assert set(assert_replaced(got, wanted, lost, image_id)) == set(lost)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_shard_replaced_by_a_corrupt_one_between_two_runs(own_shards, one_batch_steps):
    """The second half of the tar is other bytes, of the same number; the first run has stopped in mid-window."""
    folder, config = own_shards
    wanted, image_id = one_batch_steps
    packed = loader(config)
    take(packed, 3)
    state = json.loads(json.dumps(packed.state_dict()))
    shard = find_shards(str(folder))[1]
    index = read_index(shard)
    half = shard.stat().st_size // 2
    lost = {}
    for row in range(index.table.num_rows):
        sample = index.sample(row)
        if any(member.offset + member.size > half for member in sample.members):
            lost[f"{shard.name}/{sample.key}"] = "checksum"
    assert 0 < len(lost) < index.table.num_rows
    with open(shard, "r+b") as file:
        file.seek(half)
        file.write(np.random.default_rng(0).bytes(shard.stat().st_size - half))

    for ranks, workers in ((1, 0), (2, 2), (4, 1)):
        parts = [loader(replace(config, num_workers=workers), rank=rank, ranks=ranks) for rank in range(ranks)]
        got = []
        for packed in parts:
            packed.load_state_dict(state)
        for _ in range(13):
            steps = [packed.next_step() for packed in parts]
            got += [steps[pack % ranks][pack // ranks] for pack in range(4)]
        for packed in parts:
            packed.close()
        assert assert_replaced(got, wanted[12:], lost, image_id)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_disappears_is_replaced_from_the_others(own_shards, one_batch_steps, workers):
    folder, config = own_shards
    wanted, image_id = one_batch_steps
    packed = loader(replace(config, num_workers=workers))
    shard = find_shards(str(folder))[0]
    index = read_index(shard)
    lost = {f"{shard.name}/{index.sample(row).key}": "unreadable_shard" for row in range(index.table.num_rows)}
    shard.unlink()
    got = take(packed, 16)
    packed.close()
    assert_replaced(got, wanted, lost, image_id)
    records = [record for batch in got for record in batch.rejected]
    assert all("cannot be opened" in record["detail"] for record in records)


def test_no_shard_at_all_leaves_padding(own_shards):
    folder, config = own_shards
    packed = loader(config)
    for shard in find_shards(str(folder)):
        shard.unlink()
    batches = take(packed, 2)
    for batch in batches:
        assert not any(batch.sample_ids)
        assert not batch.num_tokens
        assert not batch.num_loss_tokens
        assert len(batch.segment_lengths) == len(batch.cu_seqlens) - 1
        assert {record["replaced_by"] for record in batch.rejected} == {""}
        packed.tally.add(batch.num_samples, batch.rejected)
    with pytest.raises(DataError, match=r"samples could not be used .* unreadable_shard"):
        packed.tally.check(0.01, "quarantine.jsonl")


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


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_every_sample_is_seen_as_often_as_its_epochs_say(data_config, ranks, workers):
    """Twice and one and a half times; then there are no more steps, after a restart as well."""
    big, small = data_config.sources
    config = replace(data_config, sources=[replace(big, epochs=2), replace(small, epochs=1.5)], num_workers=workers)
    parts = [loader(config, rank=rank, ranks=ranks) for rank in range(ranks)]
    seen: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    while steps := [batch for packed in parts for batch in packed.next_step()]:
        assert len(steps) == 4
        seen.update(name for batch in steps for name in batch.sample_ids if name)
        domains.update(domain for batch in steps for domain in batch.segment_domains if domain)
    assert [packed.next_step() for packed in parts] == [[]] * ranks
    state = parts[0].state_dict()
    for packed in parts:
        packed.close()
    again = loader(config)
    again.load_state_dict(state)
    assert again.next_step() == []

    expected: Counter[str] = Counter()
    halves = 0
    for source, epochs in zip(parts[0].sources, (2, 1), strict=True):
        for row, length in enumerate(source.lengths.tolist()):
            stored = source.sample(row)
            pieces = -(-length // SEQ_LENGTH)
            expected[f"{stored.shard_name}/{stored.sample.key}"] += epochs * pieces
            halves += pieces if epochs == 1 else 0
    more = seen - expected
    assert not expected - seen
    assert 0.3 * halves < more.total() < 0.7 * halves  # half of the small source's samples, once more
    assert set(domains) == {"image_text", "interleaved", "ocr", "grounding", "video", "text", "chat"}


@pytest.mark.fast
@pytest.mark.parametrize("too_long", ["split", "truncate"])
def test_a_long_document_is_cut_between_its_pictures(tmp_path, tokenizer, data_config, too_long):
    (tmp_path / "a.png").write_bytes(encoded(pattern(140, 140), "PNG"))
    (tmp_path / "b.jpg").write_bytes(encoded(pattern(84, 168, 1)))
    text = "".join(
        f"<image> {sentence} " * 2 for sentence in ("One picture.", "And another one, with words.", "A third.")
    )
    records = tmp_path / "records.jsonl"
    document = {"domain": "interleaved", "text": text, "images": ["a.png", "b.jpg"] * 3}
    records.write_text(json.dumps(document) + "\n" + json.dumps({"domain": "text", "text": "Short."}) + "\n")
    build_shards([records], tmp_path / "out", tokenizer=tokenizer.folder)
    config = replace(data_config, sources=[SourceConfig(str(tmp_path / "out"), epochs=1)], too_long=too_long)
    packed = loader(config, seq_length=64, batch=2)
    packs = [pack for step, _ in packed.plan.steps(Position.start(1)) for pack in step]
    batches = [batch for step in iter(packed.next_step, []) for batch in step]
    if too_long == "split":  # every picture is counted once, however many pieces there are
        seen = [patches for batch in batches for patches in batch.grid_thw.prod(dim=1).tolist()]
        assert sorted(packed.expected_work()[1]) == sorted(seen)
    budget = PixelBudget(config.image_max_tokens, config.video_max_tokens)
    images = [(tmp_path / name).read_bytes() for name in document["images"]]
    whole = encode_record(document, images, [], tokenizer=tokenizer, budget=budget)
    assert len(whole) > 2 * 64

    covered = []
    for pack, batch in zip(packs, batches, strict=True):
        assert not batch.rejected
        for piece, start, name in zip(pack.pieces, batch.cu_seqlens.tolist(), batch.sample_ids, strict=False):
            if name.endswith("/00000-000000"):
                covered.append((piece.start, piece.length))
                tokens = batch.input_ids[start : start + piece.length].tolist()
                assert tokens == whole.input_ids[piece.start : piece.start + piece.length].tolist()
                assert tokens.count(tokenizer.special["<|begin_of_image|>"]) == tokens.count(
                    tokenizer.special["<|end_of_image|>"]
                )
    covered.sort()
    ends = [start + length for start, length in covered]
    assert [start for start, _ in covered] == [0, *ends[:-1]]
    assert len(covered) == 1 if too_long == "truncate" else ends[-1] == len(whole)
    slices = sum(len(batch.pixels) for batch in batches)
    assert slices == len(whole.pixels) if too_long == "split" else 0 < slices < len(whole.pixels)


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
    with pytest.raises(DataError, match=r"data\.sources has changed from big, small to small, other"):
        changed.load_state_dict(state)
    changed.load_state_dict(state, allow_changes=True)
    drawn, _, _ = state["position"]["places"][1]
    assert drawn
    assert changed.state_dict()["position"] == {"places": [[drawn, 0, 0], [0, 0, 0]], "steps": 0}
    assert changed.next_step()


@pytest.mark.fast
def test_pieces_of_another_length_begin_with_their_sample_anew(tmp_path, tokenizer, data_config):
    """A long text of which 30 pieces of 128 tokens were used has no 30 pieces of 512."""
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"domain": "text", "text": "A long text. " * 1000}) + "\n")
    build_shards([records], tmp_path / "out", tokenizer=tokenizer.folder)
    config = replace(data_config, sources=[SourceConfig(str(tmp_path / "out"), epochs=1)])
    state = loader(config, seq_length=128).state_dict()
    state["position"]["places"] = [[0, 30, 30 * 128]]
    changed = loader(config)
    changed.load_state_dict(state, allow_changes=True)
    batches = [batch for step in iter(changed.next_step, []) for batch in step]
    assert sum(batch.num_tokens for batch in batches) == changed.sources[0].lengths.sum()


@pytest.mark.fast
def test_a_batch_that_the_ranks_do_not_divide(data_config):
    with pytest.raises(DataError, match=r"train\.global_batch_size 4 is not a multiple of the data-parallel size 3"):
        loader(data_config, ranks=3)
