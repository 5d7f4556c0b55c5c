"""The loader: the same stream of packs at every layout and after every stop, and a clear error where it must stop."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.encoding.encode import encode_record
from data_pipeline.errors import DataError
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.plan.plan import PlanPosition
from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.loaders import SEQ_LENGTH, digest, loader, stream, take
from tests.data_pipeline.media_files import encoded, pattern

# Forks of a process without threads. A fork of this process, in which other tests may have left threads, could hang.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])


@pytest.mark.fast
def test_expected_work_is_that_of_the_first_window(data_config):
    packed = loader(data_config, batch=1)
    lengths, patches = packed.expected_work()
    steps, _ = packed.plan.window(PlanPosition.start(len(packed.sources)))
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
def test_skipping_steps_gives_the_state_after_them(data_config):
    packed, other = loader(data_config), loader(data_config)
    take(packed, 3)
    other.skip(1)
    other.skip(2)
    assert other.state_dict() == packed.state_dict()
    assert [digest(batch) for batch in other.next_step()] == [digest(batch) for batch in packed.next_step()]
    packed.close()
    other.close()


@pytest.mark.fast
def test_fields_of_batches_agree(data_config):
    packed = loader(data_config)
    seen: set[str] = set()
    for _ in range(12):
        for batch in packed.next_step():
            assert batch.input_ids.shape == batch.labels.shape == batch.loss_mask.shape == (SEQ_LENGTH,)
            assert batch.position_ids.shape == (3, SEQ_LENGTH)
            boundaries, lengths = batch.cu_seqlens.tolist(), batch.segment_lengths.tolist()
            assert (boundaries[0], boundaries[-1]) == (0, SEQ_LENGTH)
            assert len(boundaries) - 1 == len(lengths) == len(batch.segment_domains) == len(batch.sample_ids)
            assert len(batch.patches) == (batch.grid_thw.prod(dim=1) * batch.frames_per_image).sum()
            assert (batch.input_ids == packed.tokenizer.image_id).sum() * 4 == batch.num_patches
            assert not batch.quarantined
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


def test_resuming_at_every_step_gives_the_same_stream(data_config):
    """Compare ids and bytes over more than a window and an epoch; states go through JSON, as in a checkpoint."""
    packed = loader(data_config)
    states, expected = [packed.state_dict()], []
    for _ in range(44):
        expected.append([digest(batch) for batch in packed.next_step()])
        states.append(packed.state_dict())
    assert packed.state_dict()["position"]["streams"][0][0] > 96  # samples used of the first source, which has 96
    for step in (*range(0, 30, 4), *range(30, 44)):
        assert stream(data_config, 1, states[step]) == expected[step : step + 1]
    assert stream(data_config, 14, states[30]) == expected[30:]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_global_step_is_the_same_at_every_layout(data_config, ranks, workers):
    whole = stream(data_config, 6)
    config = replace(data_config, num_workers=workers)
    parts = [stream(config, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(6):
        assert [parts[pack % ranks][step][pack // ranks] for pack in range(4)] == whole[step]


def run_until_killed(config: DataConfig, ranks: int, workers: int, state: dict | None, out: Path) -> None:
    """Run all ranks in one process, and write a line per step: the packs in their global order, and the state."""
    parts = [loader(replace(config, num_workers=workers), rank=rank, ranks=ranks) for rank in range(ranks)]
    for packed in parts:
        if state is not None:
            packed.load_state_dict(state)
    with open(out, "w") as file:
        while True:
            steps = [packed.next_step() for packed in parts]
            packs = [digest(steps[pack % ranks][pack // ranks]) for pack in range(4)]
            print(json.dumps({"packs": packs, "state": parts[0].state_dict()}), file=file, flush=True)


def test_run_killed_at_random_resumes_with_other_ranks_and_workers(data_config, tmp_path):
    """Use kill -9 at six random moments; every run resumes from the last state that was written."""
    rng = np.random.default_rng()  # not seeded: every moment must work
    seen: list = []
    state = None
    for number, (ranks, workers) in enumerate([(1, 0), (2, 2), (4, 3), (1, 2), (2, 0), (4, 1)]):
        out = tmp_path / f"{number}.jsonl"
        run = FORKSERVER.Process(target=run_until_killed, args=(data_config, ranks, workers, state, out))
        run.start()
        steps, deadline = int(rng.integers(1, 4)), time.monotonic() + 60
        while not out.exists() or out.read_text().count("\n") < steps:
            assert time.monotonic() < deadline
            assert run.is_alive()
            time.sleep(0.002)
        time.sleep(float(rng.random()) / 50)
        workers_left = psutil.Process(run.pid).children(recursive=True)
        run.kill()
        run.join()
        _, alive = psutil.wait_procs(workers_left, timeout=10)
        assert not alive, "workers die with their run"
        lines = [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
        seen += [line["packs"] for line in lines]
        state = lines[-1]["state"]
    assert seen == json.loads(json.dumps(stream(data_config, len(seen))))


@pytest.mark.fast
def test_state_of_eight_sources_is_less_than_a_kilobyte(data_config):
    """Names have usual lengths; counters are those of a run of a month."""
    big, _ = data_config.sources
    weights = {
        "caption_web": 0.3,
        "caption_synthetic": 0.1,
        "interleaved_web": 0.15,
        "interleaved_papers": 0.05,
        "ocr_synthetic": 0.1,
        "grounding_gui": 0.05,
        "video_caption": 0.05,
        "text_general": 0.2,
    }
    config = replace(data_config, sources=[replace(big, name=name, weight=w) for name, w in weights.items()])
    state = loader(config).state_dict()
    state["position"]["streams"] = [[3 * 10**9, 999, 3 * 10**12] for _ in state["position"]["streams"]]
    state["tally"] = {"samples": 10**10, "reasons": {"checksum": 10**6, "unreadable_image": 10**6, "bad_record": 99}}
    assert len(json.dumps(state).encode()) < 1000
    again = loader(config)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert json.dumps(again.state_dict()) == json.dumps(state)


@pytest.mark.fast
@pytest.mark.parametrize("version", [1, 2, None])
def test_state_of_another_version_is_refused(data_config, version):
    """Format 2 called the streams `places`."""
    state = loader(data_config).state_dict()
    with pytest.raises(DataError, match=r"written by another version .* model.init_from"):
        loader(data_config).load_state_dict({**state, "format": version}, allow_changes=True)


def test_state_of_two_ranks_with_workers_resumes_on_one_without(data_config):
    packed = loader(replace(data_config, num_workers=2), rank=1, ranks=2)
    for _ in range(3):
        packed.next_step()
    state = packed.state_dict()
    packed.close()
    assert stream(data_config, 3, state) == stream(data_config, 6)[3:]


def test_loader_can_load_an_earlier_state_and_be_closed_and_used_again(data_config):
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
def test_loader_leaves_the_random_state_of_the_training_process_alone(data_config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader(data_config).next_step()
    assert torch.rand(3).equal(expected)


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
    quarantined = [entry for batch in batches for entry in batch.quarantined]
    assert quarantined
    assert {(entry["reason"], entry["key"]) for entry in quarantined} == {("too_long", "00000-000000")}
    assert "tokens do not fit train.seq_length 128" in quarantined[0]["detail"]
    pieces = [
        batch.segment_lengths[segment].item()
        for batch in batches
        for segment, name in enumerate(batch.sample_ids)
        if name == "shard-00000-00000.tar/00000-000006"
    ]
    length = int(packed.sources[0].lengths[6])
    assert set(pieces) == {128, length % 128}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_every_sample_comes_as_often_as_epochs_says(data_config, ranks, workers):
    """Epochs are 2 and 1.5. Then there are no more steps, after a restart as well."""
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
def test_long_document_is_cut_between_its_images(tmp_path, tokenizer, data_config, too_long):
    (tmp_path / "a.png").write_bytes(encoded(pattern(140, 140), "PNG"))
    (tmp_path / "b.jpg").write_bytes(encoded(pattern(84, 168, 1)))
    text = "".join(
        f"<image> {sentence} " * 2 for sentence in ("One image.", "And another one, with words.", "A third.")
    )
    records = tmp_path / "records.jsonl"
    document = {"domain": "interleaved", "text": text, "images": ["a.png", "b.jpg"] * 3}
    records.write_text(json.dumps(document) + "\n" + json.dumps({"domain": "text", "text": "Short."}) + "\n")
    build_shards([records], tmp_path / "out", tokenizer=tokenizer.folder)
    config = replace(data_config, sources=[SourceConfig(str(tmp_path / "out"), epochs=1)], too_long=too_long)
    packed = loader(config, seq_length=64, batch=2)
    packs = [pack for step, _ in packed.plan.steps(PlanPosition.start(1)) for pack in step]
    batches = [batch for step in iter(packed.next_step, []) for batch in step]
    if too_long == "split":  # every image is counted once, however many pieces there are
        seen = [patches for batch in batches for patches in batch.grid_thw.prod(dim=1).tolist()]
        assert sorted(packed.expected_work()[1]) == sorted(seen)
    budget = PixelBudget(config.image_max_tokens, config.video_max_tokens)
    images = [(tmp_path / name).read_bytes() for name in document["images"]]
    whole = encode_record(document, images, [], tokenizer=tokenizer, budget=budget)
    assert len(whole) > 2 * 64

    covered = []
    for pack, batch in zip(packs, batches, strict=True):
        assert not batch.quarantined
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
    slices = sum(len(batch.patches) for batch in batches)
    assert slices == len(whole.patches) if too_long == "split" else 0 < slices < len(whole.patches)


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
        ({"too_long": "split"}, "data.too_long has changed from refuse to split"),
    ],
)
def test_error_says_what_changed_in_the_plan(data_config, changes, says):
    state = loader(data_config).state_dict()
    with pytest.raises(DataError, match=says):
        loader(replace(data_config, **changes)).load_state_dict(state)


@pytest.mark.fast
def test_changed_sources_resume_by_name_if_allowed(data_config):
    packed = loader(data_config)
    take(packed, 40)
    state = packed.state_dict()
    big, small = data_config.sources
    changed = loader(replace(data_config, sources=[small, replace(big, name="other")]))
    with pytest.raises(
        DataError, match=r"names of data\.sources .* have changed from big, small to small, other since"
    ):
        changed.load_state_dict(state)
    changed.load_state_dict(state, allow_changes=True)
    samples, _, _ = state["position"]["streams"][1]
    assert samples
    assert changed.state_dict()["position"] == {"streams": [[samples, 0, 0], [0, 0, 0]], "steps": 0}
    assert changed.next_step()


@pytest.mark.fast
def test_moved_folder_of_shards_resumes(data_config, tmp_path):
    """Its label, from the last part of the path or from `name`, and its fingerprint are the same."""
    expected = stream(data_config, 6)
    packed = loader(data_config)
    take(packed, 3)
    state = packed.state_dict()
    packed.close()
    big, small = data_config.sources
    shutil.copytree(big.path, tmp_path / "elsewhere" / "big")
    shutil.copytree(small.path, tmp_path / "renamed")
    sources = [replace(big, path=str(tmp_path / "elsewhere" / "big")), replace(small, path=str(tmp_path / "renamed"))]
    with pytest.raises(DataError, match=r"without `name`, the last part of the path.* from big, small to big, renamed"):
        loader(replace(data_config, sources=sources)).load_state_dict(state)
    moved = replace(data_config, sources=[sources[0], replace(sources[1], name="small")])
    assert loader(moved).source_fingerprints == state["sources"] == loader(data_config).source_fingerprints
    assert stream(moved, 3, state) == expected[3:]


@pytest.mark.fast
def test_folder_with_other_samples_is_refused(data_config):
    """The other folder has the same label, but not the same samples."""
    state = loader(data_config).state_dict()
    big, small = data_config.sources
    swapped = replace(
        data_config, sources=[replace(small, name="big", weight=2.0), replace(big, name="small", weight=1.0)]
    )
    with pytest.raises(DataError, match=r"the samples of source 'big', .* have changed"):
        loader(swapped).load_state_dict(state)


@pytest.mark.fast
def test_changed_weight_is_refused_without_its_checksum(data_config):
    state = loader(data_config).state_dict()
    big, small = data_config.sources
    changed = loader(replace(data_config, sources=[replace(big, weight=5.0), small]))
    with pytest.raises(DataError, match=r"data\.sources\[\]\.weight or epochs has changed since the checkpoint"):
        changed.load_state_dict(state)


@pytest.mark.fast
def test_sample_begins_again_if_its_pieces_have_another_length(tmp_path, tokenizer, data_config):
    """A long text of which 30 pieces of 128 tokens were used has no 30 pieces of 512."""
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"domain": "text", "text": "A long text. " * 1000}) + "\n")
    build_shards([records], tmp_path / "out", tokenizer=tokenizer.folder)
    config = replace(data_config, sources=[SourceConfig(str(tmp_path / "out"), epochs=1)])
    state = loader(config, seq_length=128).state_dict()
    state["position"]["streams"] = [[0, 30, 30 * 128]]
    changed = loader(config)
    changed.load_state_dict(state, allow_changes=True)
    batches = [batch for step in iter(changed.next_step, []) for batch in step]
    assert sum(batch.num_tokens for batch in batches) == changed.sources[0].lengths.sum()


@pytest.mark.fast
def test_batch_that_the_ranks_do_not_divide_is_refused(data_config):
    with pytest.raises(DataError, match=r"train\.global_batch_size 4 is not a multiple of the data-parallel size 3"):
        loader(data_config, ranks=3)


@pytest.mark.parametrize("most", [1536, 12])
def test_small_steps_hold_all_samples_in_few_packs_which_are_the_same_at_every_layout(data_config, most):
    """Of 1,536 packs those that are needed; of 12, steps of about the same size, not a full and a small one."""
    once = replace(data_config, sources=[replace(source, epochs=1.0) for source in data_config.sources])
    plain = loader(once)
    expected = list(iter(plain.next_step, []))
    found = {}
    for ranks, multiple in ((1, 1), (3, 2)):
        readers = [loader(once, batch=most, rank=r, ranks=ranks, small_steps=multiple) for r in range(ranks)]
        steps = []
        while (shares := [reader.next_step() for reader in readers])[0]:
            assert {len(share) % multiple for share in shares} == {0}
            assert len({len(share) for share in shares}) == 1
            steps.append([shares[n % ranks][n // ranks] for n in range(ranks * len(shares[0]))])
        found[ranks] = [[digest(batch) for batch in step if batch.num_samples] for step in steps]
        assert content_of(steps) == content_of(expected)
    assert found[1] == found[3]
    sizes = [len(step) for step in found[1]]
    tokens = sum(int(source.lengths.sum()) for source in plain.sources)
    assert sum(sizes) <= 1.3 * tokens / SEQ_LENGTH + 2
    assert max(sizes) <= min(sizes) + 1


def content_of(steps):
    """Return the ids of all samples, and how many tokens carry loss. Long texts may be cut elsewhere."""
    batches = [batch for step in steps for batch in step]
    return {sample for batch in batches for sample in batch.sample_ids}, sum(batch.num_loss_tokens for batch in batches)
