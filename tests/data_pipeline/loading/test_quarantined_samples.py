"""Samples that cannot be read during a run are replaced by rule, equally in every layout; all others stay the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.encoding.batch import Batch
from data_pipeline.errors import DataError
from data_pipeline.shards.catalogue import find_shards
from data_pipeline.shards.index import read_index
from tests.data_pipeline.loaders import loader, take


def segments(batch: Batch, image_id: int) -> list[tuple[str, int, int, str]]:
    """Return sample id, first token, tokens with padding, and a checksum of the content of every segment."""
    bounds = batch.cu_seqlens.tolist()
    grids = iter(zip(batch.grid_thw.tolist(), batch.frames_per_image.tolist(), strict=True))
    found, slices = [], 0
    for number, (start, end) in enumerate(pairwise(bounds)):
        content = hashlib.sha256(batch.segment_domains[number].encode())
        for name in ("input_ids", "labels", "loss_mask", "position_ids"):
            content.update(getattr(batch, name)[..., start:end].contiguous().numpy().tobytes())
        tokens = int((batch.input_ids[start:end] == image_id).sum())
        while tokens:
            (_, h, w), frames = next(grids)
            content.update(batch.patches[slices : slices + h * w * frames].numpy().tobytes())
            slices += h * w * frames
            tokens -= h * w // 4
        found.append((batch.sample_ids[number], start, end - start, content.hexdigest()))
    assert slices == len(batch.patches)
    return found


def overwrite(shard: Path, key: str, member: int = 1) -> None:
    """Change bytes in the middle of a member, as a bad disk does; tar headers and index stay the same."""
    index = read_index(shard)
    sample = next(s for s in map(index.sample, range(index.table.num_rows)) if s.key == key)
    with open(shard, "r+b") as file:
        file.seek(sample.members[member].offset + sample.members[member].size // 2)
        file.write(bytes(20))


def key_with_media(shard: Path, nth: int = 0) -> str:
    """Return the key of the nth sample of a shard that has an image or video."""
    index = read_index(shard)
    samples = [index.sample(row) for row in range(index.table.num_rows)]
    return [sample.key for sample in samples if len(sample.members) > 1][nth]


def assert_replaced(got: list[Batch], want: list[Batch], quarantined: dict[str, str], image_id: int) -> Counter[str]:
    """Check that only the segments of quarantined samples ({id: reason}) changed, and that the records say so.

    Returns:
        How often each quarantined sample came.
    """
    replaced: Counter[str] = Counter()
    for batch, before in zip(got, want, strict=True):
        records = [(f"{r['shard']}/{r['key']}", r["reason"]) for r in batch.quarantined]
        replaced_by = {record["replaced_by"] for record in batch.quarantined}
        expected = []
        for now, then in zip(segments(batch, image_id), segments(before, image_id), strict=True):
            if then[0] in quarantined:
                assert now[1:3] == then[1:3]
                assert now[0] not in quarantined
                assert now[0] in replaced_by
                expected.append((then[0], quarantined[then[0]]))
                replaced[then[0]] += 1
            else:
                assert now == then
        assert [record for record in records if record in expected] == expected
        assert set(records) <= set(quarantined.items())  # a substitute may be quarantined too
    return replaced


@pytest.fixture(scope="module")
def undamaged(shard_folders, tokenizer_folder):
    """The packs of 16 steps of the small source, undamaged, and the id of <|image|>."""
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
def test_quarantined_samples_are_replaced_and_nothing_else_changes(own_shards, undamaged, workers, ranks):
    folder, config = own_shards
    wanted, image_id = undamaged
    first, second, *_ = find_shards(str(folder))
    quarantined = {
        f"{first.name}/{key_with_media(first)}": "checksum",
        f"{second.name}/{key_with_media(second, 1)}": "checksum",
    }
    for name in quarantined:
        overwrite(folder / name.partition("/")[0], name.partition("/")[2])
    parts = [loader(replace(config, num_workers=workers), rank=rank, ranks=ranks) for rank in range(ranks)]
    got = []
    for _ in range(16):
        steps = [packed.next_step() for packed in parts]
        got += [steps[pack % ranks][pack // ranks] for pack in range(4)]
    for packed in parts:
        packed.close()
    assert set(assert_replaced(got, wanted, quarantined, image_id)) == set(quarantined)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_samples_of_a_shard_corrupted_between_two_runs_are_replaced(own_shards, undamaged):
    """The second half of the tar is overwritten; the first run has stopped in the middle of a window."""
    folder, config = own_shards
    wanted, image_id = undamaged
    packed = loader(config)
    take(packed, 3)
    state = json.loads(json.dumps(packed.state_dict()))
    shard = find_shards(str(folder))[1]
    index = read_index(shard)
    half = shard.stat().st_size // 2
    quarantined = {}
    for row in range(index.table.num_rows):
        sample = index.sample(row)
        if any(member.offset + member.size > half for member in sample.members):
            quarantined[f"{shard.name}/{sample.key}"] = "checksum"
    assert 0 < len(quarantined) < index.table.num_rows
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
        assert assert_replaced(got, wanted[12:], quarantined, image_id)


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_a_deleted_shard_are_replaced_from_the_others(own_shards, undamaged, workers):
    folder, config = own_shards
    wanted, image_id = undamaged
    packed = loader(replace(config, num_workers=workers, retry_seconds=0.0, on_lost_shard="quarantine"))
    shard = find_shards(str(folder))[0]
    index = read_index(shard)
    quarantined = {f"{shard.name}/{index.sample(row).key}": "unreadable_shard" for row in range(index.table.num_rows)}
    shard.unlink()
    got = take(packed, 16)
    packed.close()
    assert assert_replaced(got, wanted, quarantined, image_id)
    records = [record for batch in got for record in batch.quarantined]
    assert all("cannot be opened" in record["detail"] for record in records)


def test_packs_are_padding_if_all_shards_are_deleted(own_shards):
    folder, config = own_shards
    packed = loader(replace(config, retry_seconds=0.0, on_lost_shard="quarantine"))
    for shard in find_shards(str(folder)):
        shard.unlink()
    batches = take(packed, 2)
    for batch in batches:
        assert not any(batch.sample_ids)
        assert not batch.num_tokens
        assert not batch.num_loss_tokens
        assert len(batch.segment_lengths) == len(batch.cu_seqlens) - 1
        assert {record["replaced_by"] for record in batch.quarantined} == {""}
        packed.tally.add(batch.num_samples, batch.quarantined)
    with pytest.raises(DataError, match=r"samples could not be used .* unreadable_shard"):
        packed.tally.check(0.01, "quarantine.jsonl")
