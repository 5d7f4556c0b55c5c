"""Indexes: exact lengths without decoding, and indexes that do not fit their shard, tokenizer or version."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from benchmarks.indexing import in_new_process, write_folder
from data_pipeline.config import SourceConfig
from data_pipeline.encoding.encode import encode_record
from data_pipeline.encoding.tokenizer import IMAGE_END, IMAGE_START, VIDEO_END, VIDEO_START, GlmTokenizer
from data_pipeline.errors import BadSample, DataError
from data_pipeline.loading.source import Source
from data_pipeline.media.images import MAX_ASPECT, grid_of, resized_size, tokens_of
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.media.video import VideoInfo, video_geometry
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.arrow_file import new_arrow_file
from data_pipeline.shards.catalogue import find_shards, read_catalogue, write_catalogue
from data_pipeline.shards.index import CATALOGUE, FORMAT, index_path, index_row, read_index, write_index
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardWriter


@pytest.fixture
def shards(shard_folders, tmp_path) -> Path:
    return Path(shutil.copytree(shard_folders[1], tmp_path / "shards"))


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
    """From the first to the last special token of each picture and clip, found by reading the tokens one by one."""
    names = {tokenizer.special[name]: name for name in (IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END)}
    found: list[tuple[int, int]] = []
    start, inside_video = 0, False
    for place, token in enumerate(ids.tolist()):
        match names.get(token):
            case "<|begin_of_video|>":
                start, inside_video = place, True
            case "<|begin_of_image|>" if not inside_video:
                start = place
            case "<|end_of_video|>":
                inside_video = False
                found.append((start, place + 1 - start))
            case "<|end_of_image|>" if not inside_video:
                found.append((start, place + 1 - start))
    return found


@pytest.mark.fast
def test_find_shards(shards, tmp_path):
    names = [path.name for path in find_shards(str(shards))]
    assert names == sorted(names)
    assert len(names) > 1
    assert [path.name for path in find_shards(str(shards / "*00001.tar"))] == ["shard-00000-00001.tar"]
    assert [path.name for path in find_shards(str(shards / "shard-00000-00000.tar"))] == ["shard-00000-00000.tar"]
    odd = shards / "odd [1] 図.tar"
    (shards / "shard-00000-00000.tar").rename(odd)
    assert find_shards(str(odd)) == [odd], "a file that is there is no pattern"
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_shards(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no shards .*tools\.shard build"):
        find_shards(str(tmp_path / "empty"))
    (tmp_path / "empty" / "rejected.jsonl").touch()
    with pytest.raises(DataError, match=r"holds no shards .*its rejected\.jsonl says why"):
        find_shards(str(tmp_path / "empty"))


@pytest.mark.fast
def test_a_missing_shard(shards, tokenizer):
    (shards / "shard-00000-00001.tar").unlink()
    with pytest.raises(
        DataError, match=r"shard-00000-00001\.tar is missing although shard-00000-00001\.index\.arrow is there: restore"
    ):
        Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())


@pytest.mark.fast
def test_a_source_that_is_no_shard(shards, opened):
    (shards / "my records.jsonl").touch()
    with pytest.raises(DataError, match=r"is not a shard: .* build --input '.*my records\.jsonl'"):
        opened("my records.jsonl")


@pytest.mark.fast
def test_a_command_can_be_copied_from_a_message(shards, opened):
    folder = shards.rename(shards.with_name("two words"))
    index_path(folder / "shard-00000-00001.tar").unlink()
    with pytest.raises(DataError, match=r"run `python -m tools\.shard index '.*/two words/shard-00000-00001\.tar' --"):
        read_index(folder / "shard-00000-00001.tar")


@pytest.mark.fast
def test_a_shard_without_an_index(shards):
    tar = shards / "shard-00000-00001.tar"
    index_path(tar).unlink()
    with pytest.raises(
        DataError, match=r"shard-00000-00001.tar has no index: run `python -m tools.shard index .*shard-00000-00001"
    ):
        read_index(tar)


@pytest.mark.fast
def test_an_index_older_than_its_shard(shards, tokenizer):
    first, second = shards / "shard-00000-00000.tar", shards / "shard-00000-00001.tar"
    shutil.copy(second, first)
    with pytest.raises(DataError, match=r"shard-00000-00000.index.arrow is older than its shard, .* run `python"):
        read_index(first)
    index_shards([first], tokenizer=tokenizer.folder)
    assert read_index(first).table.num_rows == read_index(second).table.num_rows


@pytest.mark.fast
def test_a_copied_data_set_may_bear_any_dates(shards):
    tar = shards / "shard-00000-00000.tar"
    os.utime(index_path(tar), (0, 0))
    assert read_index(tar).table.num_rows


@pytest.mark.fast
def test_an_index_made_with_another_tokenizer(shards, tokenizer):
    with pytest.raises(DataError, match=r"index of .*shard-00000-00000.tar was made with another tokenizer: run"):
        Source(SourceConfig(str(shards)), tokenizer_hash="0" * 16, budget=PixelBudget())
    index_shards(find_shards(str(shards)))
    with pytest.raises(DataError, match="was made with no tokenizer"):
        Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())


@pytest.mark.fast
def test_a_damaged_index(shards):
    tar = shards / "shard-00000-00000.tar"
    data = index_path(tar).read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"hello"):
        index_path(tar).write_bytes(damaged)
        with pytest.raises(DataError, match=r"index.arrow is damaged .*: run `python -m tools.shard index"):
            read_index(tar)


def in_memory(table: pa.Table) -> pa.Table:
    """Rows that stay when the file under them is written anew."""
    return pa.Table.from_pylist(table.to_pylist(), table.schema)


@pytest.mark.fast
def test_an_index_of_another_version(shards):
    tar = shards / "shard-00000-00000.tar"
    table = in_memory(read_index(tar).table).replace_schema_metadata({"format": "glmv-index-0"})
    with new_arrow_file(index_path(tar), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="was not written by this version"):
        read_index(tar)


@pytest.mark.fast
def test_a_shard_in_which_nothing_can_be_used(shards, tokenizer):
    writer = ShardWriter(shards, "bad", max_bytes=1000)
    writer.write("0", [("json", b"{}")])
    writer.close()
    counts = index_shards(writer.finished, tokenizer=tokenizer.folder)
    assert counts.rejected == {"bad_record": 1}
    source = Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget())
    assert len(source) == len(source.lengths) == len(source.is_text) == 40
    assert source.sample(0).shard_name == "shard-00000-00000.tar"


@pytest.mark.fast
def test_keys_with_ends_of_lines_in_them(shards, tokenizer):
    """U+2028 and U+0085 end lines for Python, but not in JSON lines."""
    for name in ("first", "second"):  # the second run takes up what the first has written
        with ShardWriter(shards, name, max_bytes=10_000) as writer:
            writer.write("a\u2028b\u0085c", [("json", b"{}")])
        counts = index_shards([shards / f"{name}-00000.tar"], tokenizer=tokenizer.folder)
        assert counts.rejected == {"bad_record": 1}
    origins = [json.loads(line)["origin"] for line in (shards / "rejected.jsonl").open(encoding="utf-8")]
    assert origins == [f"{name}-00000.tar/a\u2028b\u0085c" for name in ("first", "second")]


@pytest.mark.fast
def test_a_cut_shard_is_indexed_as_far_as_it_goes(shards, tokenizer):
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
def test_indexes_do_not_use_up_file_descriptors(shards):
    tar = shards / "shard-00000-00000.tar"
    before = len(os.listdir("/proc/self/fd"))
    opened = [read_index(tar) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert {index.sample(0).key for index in opened} == {opened[0].sample(0).key}


@pytest.mark.fast
def test_the_fingerprint_of_a_source_follows_its_samples(shards, tokenizer: GlmTokenizer):
    def fingerprint(**budget: int) -> str:
        source = Source(SourceConfig(str(shards)), tokenizer_hash=tokenizer.hash, budget=PixelBudget(**budget))
        return source.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(image_max_tokens=9) != first
    for path in shards.glob("shard-00000-00001.*"):
        path.unlink()
    assert fingerprint() != first


# --- the catalogue ----------------------------------------------------------------------------------------------------


def same(one: Source, other: Source) -> bool:
    columns = ("lengths", "patches", "patches_squared", "is_text", "shard_rows")
    assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)
    for row in range(len(one)):
        assert one.sample(row) == other.sample(row)
        assert one.domain_of(row) == other.domain_of(row)
        assert one.blocks(row) == other.blocks(row)
    return one.fingerprint == other.fingerprint


@pytest.fixture
def opened(shards, tokenizer):
    def open_source(pattern: str = "") -> Source:
        budget = PixelBudget(30, 60)
        return Source(SourceConfig(str(shards / pattern)), tokenizer_hash=tokenizer.hash, budget=budget)

    return open_source


@pytest.mark.fast
@pytest.mark.parametrize("pattern", ["", "*.tar", "shard-00000-00001.tar", "shard-00000-0000[02].tar", "*1.tar"])
def test_a_catalogue_says_what_the_indexes_say(shards, opened, pattern):
    from_catalogue = opened(pattern)
    (shards / CATALOGUE).unlink()
    assert same(from_catalogue, opened(pattern))
    write_catalogue(shards)
    assert same(from_catalogue, opened(pattern))


@pytest.mark.fast
def test_with_a_catalogue_neither_tars_nor_indexes_are_read(shards, opened):
    before = opened()
    for path in shards.iterdir():
        if path.name != CATALOGUE:
            path.write_bytes(b"?")
    assert opened().fingerprint == before.fingerprint
    sample = before.sample(0)
    with pytest.raises(BadSample, match=r"unreadable_shard: .*-00000\.tar has 1 bytes and is not what was indexed"):
        ShardReader().read(sample.shard, sample.sample, sample.tar_fingerprint)


@pytest.mark.fast
def test_a_catalogue_that_no_longer_holds_is_not_used(shards, opened, tokenizer):
    whole = opened()
    late = shutil.copy(shards / "shard-00000-00000.tar", shards / "zlate.tar")
    with pytest.raises(DataError, match=r"zlate\.tar has no index"):
        opened()
    assert same(opened("shard-*.tar"), whole)
    shutil.copy(index_path(shards / "shard-00000-00000.tar"), index_path(Path(late)))
    assert len(opened()) == len(whole) + int(whole.shard_rows[1]), "made elsewhere, copied here: read from the indexes"
    index_shards([Path(late)], tokenizer="")
    with pytest.raises(DataError, match=r"zlate\.tar was made with no tokenizer"):
        opened()
    index_shards([Path(late)], tokenizer=tokenizer.folder)
    assert len(opened()) == len(whole) + int(whole.shard_rows[1])


@pytest.mark.fast
def test_an_index_written_anew_takes_the_catalogue_away(shards, opened):
    index = read_index(shards / "shard-00000-00000.tar")
    write_index(
        index.file,
        index.table.slice(1).to_pylist(),
        tokenizer_hash=index.header.tokenizer_hash,
        chat_form=index.header.chat_form,
    )
    assert not (shards / CATALOGUE).exists(), "whatever happens before the new one is written"
    assert len(opened()) == 39


@pytest.mark.fast
def test_a_disk_that_is_full_keeps_what_was_there_and_gets_no_halves(shards, opened):
    """A limit of files, at the size of half of what is written, stops the writing."""
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    index = read_index(shards / "shard-00000-00000.tar")
    rows, header = index.table.to_pylist(), index.header
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_index(index.file, rows, tokenizer_hash=header.tokenizer_hash, chat_form=header.chat_form)
        with pytest.raises(OSError, match="File too large"):
            write_catalogue(shards)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


@pytest.mark.fast
def test_a_damaged_catalogue(shards, opened):
    data = (shards / CATALOGUE).read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"hello", data[:-300] + bytes(300)):
        (shards / CATALOGUE).write_bytes(damaged)
        with pytest.raises(DataError, match=r"catalogue.arrow is damaged .*: run `python -m tools.shard index"):
            opened()


@pytest.mark.fast
def test_a_source_travels_as_its_configuration(opened):
    source = opened()
    here, there = multiprocessing.Pipe()
    here.send(source)
    assert len(ForkingPickler.dumps(source)) < 1000
    received = there.recv()
    assert received is not source
    assert same(received, source)


def test_many_rows_of_every_kind(tmp_path):
    """20,000 rows over several batches, worked out one by one with the scalar rules."""
    rng = np.random.default_rng(5)
    rows, wanted = [], []
    budget = PixelBudget(100, 400)
    for number in range(20_000):
        images = [
            (int(h), int(min(max(w, h // MAX_ASPECT + 1), h * MAX_ASPECT)))
            for h, w in rng.integers(1, 3000, (number % 4, 2))
        ]
        videos = [VideoInfo(int(rng.integers(2, 40)), 8.0, 4.0, 64, int(rng.integers(60, 70)))] * (number % 10 == 0)
        patches = [h * w for h, w in (grid_of(resized_size(*size, max_tokens=100)) for size in images)]
        for info in videos:
            layout = video_geometry(info, 400)
            patches += [4 * tokens_of(layout.grid)] * len(layout.seconds)
        wanted.append((7 + sum(patches) // 4, sum(patches), sum(n * n for n in patches)))
        rows.append(index_row(ShardSample(str(number)), "text", 7, images, videos, []))
    (tmp_path / "a.tar").touch()
    write_index(tmp_path / "a.tar", rows, tokenizer_hash="t", chat_form="glm45v")
    write_catalogue(tmp_path)
    source = Source(SourceConfig(str(tmp_path)), tokenizer_hash="t", budget=budget)
    assert list(zip(source.lengths, source.patches, source.patches_squared, strict=True)) == wanted
    assert source.sample(19_999).sample.key == "19999"


@pytest.mark.slow
def test_a_million_samples_open_within_a_second_and_100_megabytes(tmp_path):
    write_folder(tmp_path, samples=1_000_000, shards=10_000)
    figures = in_new_process(tmp_path)
    assert (figures["samples"], figures["shards"]) == (1_000_000, 10_000)
    assert figures["CPU seconds"] < 1
    assert figures["MB anonymous"] + figures["MB mapped"] < 100


# --- damage -----------------------------------------------------------------------------------------------------------


def what_becomes_of(folder: Path, name: str, times: int) -> Counter[str]:
    """One file of a folder with flipped bits, cut short or partly zeros: read to the last value each time."""

    def content() -> Any:
        if name == CATALOGUE:
            shards, rows = read_catalogue(folder / name, "the mend")
            return shards, rows.to_pylist()
        index = read_index(folder / name.replace(".index.arrow", ".tar"))
        return index.header, index.table.to_pylist()

    lot = random.Random(name)
    whole, wanted = (folder / name).read_bytes(), content()
    outcomes: Counter[str] = Counter()
    for number in range(times):
        damaged = bytearray(whole)
        place = lot.randrange(len(whole))
        if number % 4 == 0:
            del damaged[place:]
        elif number % 4 == 1:
            damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
        else:
            damaged[place] ^= 1 << lot.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            outcomes["same" if content() == wanted else "other rows"] += 1
        except DataError:
            outcomes["DataError"] += 1
        except Exception as error:
            outcomes[type(error).__name__] += 1
    (folder / name).write_bytes(whole)
    return outcomes


@pytest.mark.parametrize("times", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_damage_is_told_and_crashes_nothing(shards, times):
    """In a process of its own, as Arrow takes its process down with it when it reads what it should not."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name in (CATALOGUE, "shard-00000-00000.index.arrow"):
            outcomes = pool.submit(what_becomes_of, shards, name, times).result()
            assert set(outcomes) <= {"DataError", "same"}, outcomes
            assert outcomes["DataError"] > 0.8 * times  # zeros over zeros are no damage


@pytest.mark.fast
def test_files_of_another_shape_with_a_checksum_that_is_right(shards):
    tar, catalogue = shards / "shard-00000-00000.tar", shards / CATALOGUE
    table = in_memory(read_index(tar).table)
    header = json.dumps(asdict(read_index(tar).header))
    strange = table.set_column(2, "text_tokens", table.column("text_tokens").cast(pa.string()))
    for rows, said in (
        (table.replace_schema_metadata({"format": FORMAT}), "header"),
        (table.replace_schema_metadata({"format": FORMAT, "header": "[1]"}), "TypeError"),
        (table.replace_schema_metadata({"format": FORMAT, "header": "{"}), "JSONDecodeError"),
        (table.replace_schema_metadata({"format": FORMAT, "header": "[" * 100_000}), "RecursionError"),
        (table.replace_schema_metadata({"format": FORMAT, "header": '{"tar_fingerprint": 3}'}), "TypeError"),
        (strange.replace_schema_metadata({"format": FORMAT, "header": header}), "columns"),
        (table.replace_schema_metadata(None), "not written by this version"),
    ):
        with new_arrow_file(index_path(tar), rows.schema) as writer:
            writer.write_table(rows)
        with pytest.raises(DataError, match=f"index.arrow .*{said}.*: run `python"):
            read_index(tar)
    entry = {"name": tar.name, "rows": table.num_rows, **json.loads(header)}
    for footer in (
        None,
        {"shards": "{}"},
        {"shards": "3"},
        {"shards": json.dumps([tar.name])},
        {"shards": json.dumps([{**entry, "rows": "5"}])},
        {"shards": json.dumps([{**entry, "name": "../../etc/passwd"}])},
        {"shards": json.dumps([{**entry, "tar_fingerprint": "long"}])},
        {"shards": json.dumps([entry, entry])},
    ):
        rows = table.replace_schema_metadata({"format": FORMAT})
        with new_arrow_file(catalogue, rows.schema, footer) as writer:
            writer.write_table(rows)
        with pytest.raises(DataError, match=r"catalogue.arrow is damaged .*: the mend"):
            read_catalogue(catalogue, "the mend")


@pytest.mark.fast
def test_another_program_reads_the_file_without_its_last_bytes(shards):
    data = index_path(shards / "shard-00000-00000.tar").read_bytes()
    assert pa.ipc.open_file(data[:-16]).read_all().equals(read_index(shards / "shard-00000-00000.tar").table)
    assert data[-16:] == b"xxh3sum\n" + xxhash.xxh3_64(data[:-16]).digest()
