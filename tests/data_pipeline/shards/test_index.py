"""Indexes: exact lengths without decoding, and indexes that do not fit their shard or tokenizer."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.encoding.encode import encode_record
from data_pipeline.encoding.tokenizer import IMAGE_END, IMAGE_START, VIDEO_END, VIDEO_START, GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.loading.source import Source
from data_pipeline.media.image_sizes import grid_of, resized_size, tokens_of
from data_pipeline.media.pixel_budget import MAX_ASPECT, PixelBudget
from data_pipeline.media.video_files import VideoInfo
from data_pipeline.media.video_sampling import video_geometry
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.catalogue import find_shards, write_catalogue
from data_pipeline.shards.index import index_path, index_row, read_index, write_index
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardWriter


@pytest.mark.parametrize("budget", [PixelBudget(6144, 30000), PixelBudget(9, 60), PixelBudget(30, 20)])
def test_lengths_from_metadata_equal_lengths_of_decoded_samples(shard_folders, tokenizer, budget):
    source = Source(SourceConfig(str(shard_folders[1])), tokenizer_hash=tokenizer.hash, budget=budget)
    reader = ShardReader()
    assert len(source) == 40
    for row in range(len(source)):
        stored = source.sample(row)
        raw = reader.read(stored.shard, stored.sample, stored.tar_fingerprint)
        encoded = encode_record(raw.record, raw.images, raw.videos, tokenizer=tokenizer, budget=budget)
        assert len(encoded) == source.lengths[row]
        assert encoded.domain == source.domain_of(row)
        assert (encoded.domain == "text") == source.is_text[row]
        patches = [h * w for h, w in encoded.grids]
        assert source.image_patches(row) == patches
        assert source.patches[row] == sum(patches)
        assert source.patches_squared[row] == sum(n * n for n in patches)
        assert source.blocks(row) == blocks_in(encoded.input_ids, tokenizer)


def blocks_in(ids: np.ndarray, tokenizer: GlmTokenizer) -> list[tuple[int, int]]:
    """Find the (start, length) of each image and video by reading the tokens one by one."""
    names = {tokenizer.special[name]: name for name in (IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END)}
    found: list[tuple[int, int]] = []
    start, inside_video = 0, False
    for position, token in enumerate(ids.tolist()):
        match names.get(token):
            case "<|begin_of_video|>":
                start, inside_video = position, True
            case "<|begin_of_image|>" if not inside_video:
                start = position
            case "<|end_of_video|>":
                inside_video = False
                found.append((start, position + 1 - start))
            case "<|end_of_image|>" if not inside_video:
                found.append((start, position + 1 - start))
    return found


@pytest.mark.fast
def test_missing_shard_is_an_error(shards, tokenizer):
    (shards / "shard-00000-00001.tar").unlink()
    with pytest.raises(
        DataError, match=r"shard-00000-00001\.tar is missing although shard-00000-00001\.index\.arrow is there: restore"
    ):
        Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())


@pytest.mark.fast
def test_command_in_a_message_is_quoted_for_the_shell(shards, opened):
    folder = shards.rename(shards.with_name("two words"))
    index_path(folder / "shard-00000-00001.tar").unlink()
    with pytest.raises(DataError, match=r"run `python -m tools\.shard index '.*/two words/shard-00000-00001\.tar' --"):
        read_index(folder / "shard-00000-00001.tar")


@pytest.mark.fast
def test_shard_without_an_index_is_an_error(shards):
    tar = shards / "shard-00000-00001.tar"
    index_path(tar).unlink()
    with pytest.raises(
        DataError, match=r"shard-00000-00001.tar has no index: run `python -m tools.shard index .*shard-00000-00001"
    ):
        read_index(tar)


@pytest.mark.fast
def test_index_older_than_its_shard_is_an_error(shards, tokenizer):
    first, second = shards / "shard-00000-00000.tar", shards / "shard-00000-00001.tar"
    shutil.copy(second, first)
    with pytest.raises(DataError, match=r"shard-00000-00000.index.arrow is older than its shard, .* run `python"):
        read_index(first)
    index_shards([first], tokenizer=tokenizer.folder)
    assert read_index(first).table.num_rows == read_index(second).table.num_rows


@pytest.mark.fast
def test_dates_of_files_do_not_matter(shards):
    tar = shards / "shard-00000-00000.tar"
    os.utime(index_path(tar), (0, 0))
    assert read_index(tar).table.num_rows


@pytest.mark.fast
def test_index_of_another_tokenizer_is_an_error(shards, tokenizer):
    with pytest.raises(DataError, match=r"index of .*shard-00000-00000.tar was made with another tokenizer: run"):
        Source(SourceConfig(str(shards)), tokenizer_hash="0" * 16, budget=PixelBudget())
    index_shards(find_shards(str(shards)))
    with pytest.raises(DataError, match="was made with no tokenizer"):
        Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())


@pytest.mark.fast
def test_damaged_index_is_an_error(shards):
    tar = shards / "shard-00000-00000.tar"
    data = index_path(tar).read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"hello"):
        index_path(tar).write_bytes(damaged)
        with pytest.raises(DataError, match=r"index.arrow is damaged .*: run `python -m tools.shard index"):
            read_index(tar)


@pytest.mark.fast
def test_shard_without_a_usable_sample_has_an_empty_index(shards, tokenizer):
    writer = ShardWriter(shards, "bad", max_bytes=1000)
    writer.write("0", [("json", b"{}")])
    writer.close()
    counts = index_shards(writer.finished, tokenizer=tokenizer.folder)
    assert counts.rejected == {"bad_record": 1}
    source = Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())
    assert len(source) == len(source.lengths) == len(source.is_text) == 40
    assert source.sample(0).shard_name == "shard-00000-00000.tar"


@pytest.mark.fast
def test_keys_with_line_separators_are_listed_in_one_line_each(shards, tokenizer):
    """U+2028 and U+0085 separate lines for Python, but not in JSON lines."""
    for name in ("first", "second"):  # the second run keeps the lines of the first
        with ShardWriter(shards, name, max_bytes=10_000) as writer:
            writer.write("a\u2028b\u0085c", [("json", b"{}")])
        counts = index_shards([shards / f"{name}-00000.tar"], tokenizer=tokenizer.folder)
        assert counts.rejected == {"bad_record": 1}
    origins = [json.loads(line)["origin"] for line in (shards / "rejected.jsonl").open(encoding="utf-8")]
    assert origins == [f"{name}-00000.tar/a\u2028b\u0085c" for name in ("first", "second")]


@pytest.mark.fast
@pytest.mark.parametrize("line", ["a,b", "[]", '{"key": "a"}', '{"origin": 3}'])
def test_rejected_samples_of_another_program_are_not_overwritten(shards, tokenizer, line):
    (shards / "rejected.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"rejected.jsonl is damaged, or of another program: rename or remove it"):
        index_shards([shards / "shard-00000-00000.tar"], tokenizer=tokenizer.folder)
    assert (shards / "rejected.jsonl").read_text() == f"{line}\n"


@pytest.mark.fast
def test_cut_shard_is_indexed_up_to_the_cut(shards, tokenizer):
    tar = shards / "shard-00000-00000.tar"
    samples = [read_index(tar).sample(row) for row in range(read_index(tar).table.num_rows)]
    os.truncate(tar, samples[-1].members[-1].offset + 10)
    counts = index_shards([tar], tokenizer=tokenizer.folder)
    assert counts.rejected == {"truncated_tar": 1}
    (line,) = (shards / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["origin"] == f"{tar.name}/{samples[-1].key}"
    index = read_index(tar)
    assert [index.sample(row) for row in range(index.table.num_rows)] == samples[:-1]


@pytest.mark.fast
def test_open_indexes_hold_no_file_descriptors(shards):
    tar = shards / "shard-00000-00000.tar"
    before = len(os.listdir("/proc/self/fd"))
    opened = [read_index(tar) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert {index.sample(0).key for index in opened} == {opened[0].sample(0).key}


@pytest.mark.fast
def test_fingerprint_of_a_source_changes_with_its_samples(shards, tokenizer: GlmTokenizer):
    def fingerprint(**budget: int) -> str:
        source = Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget(**budget))
        return source.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(image_max_tokens=9) != first
    for path in shards.glob("shard-00000-00001.*"):
        path.unlink()
    assert fingerprint() != first


def test_lengths_of_many_rows_equal_the_scalar_rules(tmp_path):
    """20,000 rows in several batches, compared one by one."""
    rng = np.random.default_rng(5)
    rows, expected = [], []
    budget = PixelBudget(100, 400)
    for number in range(20_000):
        images = [
            (int(h), int(min(max(w, h // MAX_ASPECT + 1), h * MAX_ASPECT)))
            for h, w in rng.integers(1, 3000, (number % 4, 2))
        ]
        videos = [VideoInfo(int(rng.integers(2, 40)), 8.0, 4.0, 64, int(rng.integers(60, 70)))] * (number % 10 == 0)
        patches = [h * w for h, w in (grid_of(resized_size(*size, max_tokens=100)) for size in images)]
        for info in videos:
            geometry = video_geometry(info, 400)
            patches += [4 * tokens_of(geometry.grid)] * len(geometry.seconds)
        expected.append((7 + sum(patches) // 4, sum(patches), sum(n * n for n in patches)))
        rows.append(
            index_row(
                ShardSample(str(number)),
                "text",
                7,
                images,
                [(info, len(video_geometry(info, 400).seconds)) for info in videos],
                [],
            )
        )
    (tmp_path / "a.tar").touch()
    write_index(tmp_path / "a.tar", rows, tokenizer_hash="t", chat_form="glm45v")
    write_catalogue(tmp_path)
    source = Source(SourceConfig(str(tmp_path)), tokenizer_hash="t", budget=budget)
    assert list(zip(source.lengths, source.patches, source.patches_squared, strict=True)) == expected
    assert source.sample(19_999).sample.key == "19999"
