"""The index beside every shard: all that the plan must know about its samples, without opening the tar.

    shards/caption-00000.tar            the samples
    shards/caption-00000.index.arrow    a row for each of them: SCHEMA, in an Arrow file (arrow_file.py)

An index says which tar it describes, which tokenizer counted the text and in which form chats were written. The rows of
all indexes of a folder stand once more in its catalogue (`catalogue`), which goes as soon as one of them is written.

Tokens of images are not stored: they follow from sizes and the pixel budget of the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.media.images import TEMPORAL_PATCH_SIZE
from data_pipeline.media.video import VideoInfo, frame_indices
from data_pipeline.shards.arrow_file import new_arrow_file, open_arrow_file
from data_pipeline.shards.members import Member, ShardSample, index_command
from data_pipeline.shards.tar import fingerprint, size_in

FORMAT = "glmv-index-3"
CATALOGUE = "catalogue.arrow"
INDEX_SUFFIX = ".index.arrow"
BATCH_ROWS = 16384  # rows of a record batch: what is worked on at once


def _structs(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct(list(fields.items())))


SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("domain", pa.string()),
        ("text_tokens", pa.int32()),  # all tokens but <|image|>: text, special tokens, timestamps
        ("images", _structs(height=pa.int32(), width=pa.int32())),  # upright, before resizing
        # What the container says of a clip, and how many frame pairs are looked at.
        (
            "videos",
            _structs(
                frames=pa.int64(),
                fps=pa.float64(),
                duration=pa.float64(),
                height=pa.int32(),
                width=pa.int32(),
                pairs=pa.int32(),
            ),
        ),
        # Pictures and clips in the order of the sample: tokens other than <|image|> before each and within it.
        ("blocks", _structs(video=pa.bool_(), before=pa.int32(), within=pa.int32())),
        ("members", _structs(kind=pa.string(), offset=pa.int64(), size=pa.int64(), xxh3=pa.uint64())),
    ]
)


@dataclass(frozen=True)
class IndexHeader:
    """What an index was made from."""

    tar_fingerprint: str
    tokenizer_hash: str
    chat_form: str


@dataclass(frozen=True)
class ShardIndex:
    """One shard and its rows. file: the tar."""

    file: Path
    header: IndexHeader
    table: pa.Table

    def sample(self, row: int) -> ShardSample:
        return sample_at(self.table.slice(row, 1).to_batches()[0], 0)


def index_path(tar: Path) -> Path:
    return tar.with_suffix(INDEX_SUFFIX)


def index_row(
    sample: ShardSample,
    domain: str,
    text_tokens: int,
    images: Iterable[tuple[int, int]],
    videos: Iterable[VideoInfo],
    blocks: Iterable[tuple[bool, int, int]],
) -> dict[str, Any]:
    """A row of SCHEMA. images: (height, width) of each; blocks: (is a clip, tokens other than <|image|> before it, such
    tokens within it) of every picture and clip in the order of the sample."""
    return {
        "key": sample.key,
        "domain": domain,
        "text_tokens": text_tokens,
        "images": [{"height": height, "width": width} for height, width in images],
        "videos": [{**asdict(info), "pairs": _frame_pairs(info)} for info in videos],
        "blocks": [{"video": video, "before": before, "within": within} for video, before, within in blocks],
        "members": [asdict(member) for member in sample.members],
    }


def write_index(tar: Path, rows: list[dict[str, Any]], *, tokenizer_hash: str, chat_form: str) -> None:
    """Writes the index of a shard, and removes the catalogue of its folder, which no longer holds."""
    header = IndexHeader(fingerprint(tar), tokenizer_hash, chat_form)
    schema = SCHEMA.with_metadata({"format": FORMAT, "header": json.dumps(asdict(header))})
    temporary = index_path(tar).with_suffix(".tmp")  # which the next attempt takes, should this one be killed
    try:
        with new_arrow_file(temporary, schema) as writer:
            for start in range(0, len(rows), BATCH_ROWS):
                writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + BATCH_ROWS], schema=schema))
        (tar.parent / CATALOGUE).unlink(missing_ok=True)
        os.replace(temporary, index_path(tar))
    finally:
        temporary.unlink(missing_ok=True)  # half of an index, on a disk that is full


def read_index(tar: Path) -> ShardIndex:
    """Opens a shard's index (memory-mapped). Raises DataError if it is missing, damaged, or of another tar."""
    path, mend = index_path(tar), f"run {index_command(tar)}"
    if not tar.is_file():
        raise DataError(f"shard {tar} is missing although {path.name} is there: restore it, or delete its index")
    if not path.is_file():
        raise DataError(f"shard {tar} has no index: {mend}")
    index = open_index(tar, mend)
    if index.header.tar_fingerprint != fingerprint(tar):
        raise DataError(f"{path} is older than its shard, which has changed since: {mend}")
    return index


def open_index(tar: Path, mend: str) -> ShardIndex:
    """The same for a tar that is not looked at. mend: what is said to help where DataError is raised."""
    path = index_path(tar)
    batches, metadata, _ = read_arrow(path, mend)
    with well_formed(path, mend):
        header = header_of(json.loads(metadata[b"header"]))
    return ShardIndex(tar, header, pa.Table.from_batches(batches, SCHEMA))


def read_arrow(path: Path, mend: str) -> tuple[list[pa.RecordBatch], dict[bytes, bytes], dict[bytes, bytes]]:
    """Rows of an index or catalogue, memory-mapped, and the metadata of its head and of its end.

    Raises DataError if it is damaged or of another version."""
    file = open_arrow_file(path, mend)
    metadata = file.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        raise DataError(f"{path} was not written by this version: {mend}")
    if file.schema != SCHEMA:
        raise DataError(f"{path} is damaged (its columns are not those of an index): {mend}")
    try:
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        return batches, metadata, file.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): {mend}") from error


@contextmanager
def well_formed(path: Path, mend: str) -> Iterator[None]:
    """What fails in reading the JSON of a file is a DataError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged (what it says of shards is not as written: {error!r}): {mend}") from error


def header_of(given: dict[str, Any]) -> IndexHeader:
    """Raises one of the errors of `well_formed` if it is none."""
    header = IndexHeader(**given)
    if not all(isinstance(value, str) for value in asdict(header).values()):
        raise TypeError("a header is of texts")
    size_in(header.tar_fingerprint)
    return header


def sample_at(batch: pa.RecordBatch, row: int) -> ShardSample:
    members = [Member(**member) for member in structs_at(batch, row, "members")]
    return ShardSample(batch.column("key")[row].as_py(), members)


def structs_at(batch: pa.RecordBatch, row: int, column: str) -> list[dict[str, Any]]:
    """The list of structs that a row has in a column."""
    return batch.column(column)[row].as_py()


def _frame_pairs(info: VideoInfo) -> int:
    return len(frame_indices(info.frames, info.fps, info.duration)) // TEMPORAL_PATCH_SIZE
