"""The index beside every shard: all that the plan must know about its samples, without opening the tar.

    shards/caption-00000.tar            the samples
    shards/caption-00000.index.arrow    one row per sample: SCHEMA, in an Arrow file (arrow_file.py)

An index says which tar it describes, which tokenizer counted the text and in which form chats were written. A folder's
catalogue repeats the rows of all of its indexes (catalogue.py); writing an index removes it.

Tokens of images are not stored: they follow from sizes and the pixel budget of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.files import replacing
from data_pipeline.errors import DataError
from data_pipeline.media.video_files import VideoInfo
from data_pipeline.shards.arrow_file import new_arrow_file, open_arrow_file
from data_pipeline.shards.members import Member, ShardSample, index_command
from data_pipeline.shards.tar import fingerprint, size_in

FORMAT = "glmv-index-3"
CATALOGUE = "catalogue.arrow"
INDEX_SUFFIX = ".index.arrow"
BATCH_ROWS = 16384  # rows of a record batch, which is processed at once


def _structs(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct(list(fields.items())))


SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("domain", pa.string()),
        ("text_tokens", pa.int32()),  # all tokens but <|image|>: text, special tokens, timestamps
        ("images", _structs(height=pa.int32(), width=pa.int32())),  # upright, before resizing
        # What the container says of a video, and the number of sampled frame pairs.
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
        # Images and videos in the order of the sample: tokens other than <|image|> before each and within it.
        ("blocks", _structs(video=pa.bool_(), before=pa.int32(), within=pa.int32())),
        ("members", _structs(kind=pa.string(), offset=pa.int64(), size=pa.int64(), xxh3=pa.uint64())),
    ]
)


@dataclass(frozen=True)
class IndexHeader:
    """What an index was made from."""

    tar_fingerprint: str  # tar.fingerprint
    tokenizer_hash: str  # GlmTokenizer.hash, which says how videos are sampled; empty: without a tokenizer
    chat_form: str  # one of domains.chat.CHAT_FORMS


@dataclass(frozen=True)
class ShardIndex:
    """One shard and its rows."""

    file: Path  # the tar
    header: IndexHeader
    table: pa.Table  # SCHEMA

    def sample(self, row: int) -> ShardSample:
        """Return where the sample of a row lies in the tar."""
        return sample_at(self.table.slice(row, 1).to_batches()[0], 0)


def index_path(tar: Path) -> Path:
    """Return the path of a shard's index."""
    return tar.with_suffix(INDEX_SUFFIX)


def index_row(
    sample: ShardSample,
    domain: str,
    text_tokens: int,
    images: Iterable[tuple[int, int]],
    videos: Iterable[tuple[VideoInfo, int]],
    blocks: Iterable[tuple[bool, int, int]],
) -> dict[str, Any]:
    """Return a row of SCHEMA.

    Args:
        sample: Where its members lie.
        domain: Its domain.
        text_tokens: All of its tokens but <|image|>.
        images: (height, width) of each image.
        videos: What the container says of each video, and the number of its frame pairs.
        blocks: (is a video, tokens other than <|image|> before it, such tokens within it) of every image and video in
            the order of the sample.
    """
    return {
        "key": sample.key,
        "domain": domain,
        "text_tokens": text_tokens,
        "images": [{"height": height, "width": width} for height, width in images],
        "videos": [_video_fields(info, pairs) for info, pairs in videos],
        "blocks": [{"video": video, "before": before, "within": within} for video, before, within in blocks],
        "members": [asdict(member) for member in sample.members],
    }


def write_index(tar: Path, rows: list[dict[str, Any]], *, tokenizer_hash: str, chat_form: str) -> None:
    """Write the index of a shard, and remove the catalogue of its folder, which is out of date then."""
    header = IndexHeader(fingerprint(tar), tokenizer_hash, chat_form)
    schema = SCHEMA.with_metadata({"format": FORMAT, "header": json.dumps(asdict(header))})
    with replacing(index_path(tar)) as temporary:
        with new_arrow_file(temporary, schema) as writer:
            for start in range(0, len(rows), BATCH_ROWS):
                writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + BATCH_ROWS], schema=schema))
        (tar.parent / CATALOGUE).unlink(missing_ok=True)


def read_index(tar: Path) -> ShardIndex:
    """Open the index of a shard, memory-mapped.

    Raises:
        DataError: It is missing, damaged, or of another tar.
    """
    path, fix = index_path(tar), f"run {index_command(tar)}"
    if not tar.is_file():
        raise DataError(f"shard {tar} is missing although {path.name} is there: restore it, or delete its index")
    if not path.is_file():
        raise DataError(f"shard {tar} has no index: {fix}")
    index = open_index(tar, fix)
    if index.header.tar_fingerprint != fingerprint(tar):
        raise DataError(f"{path} is older than its shard, which has changed since: {fix}")
    return index


def open_index(tar: Path, fix: str) -> ShardIndex:
    """Open the index of a shard without comparing it with the tar.

    Args:
        tar: The shard.
        fix: What to do if the index cannot be used, for the end of the message.

    Raises:
        DataError: The index is damaged or of another version.
    """
    path = index_path(tar)
    batches, metadata, _ = read_arrow(path, fix)
    with malformed_is_data_error(path, fix):
        header = parse_header(json.loads(metadata[b"header"]))
    return ShardIndex(tar, header, pa.Table.from_batches(batches, SCHEMA))


def read_arrow(path: Path, fix: str) -> tuple[list[pa.RecordBatch], dict[bytes, bytes], dict[bytes, bytes]]:
    """Return the rows of an index or catalogue, memory-mapped, and the metadata of its schema and of its footer.

    Raises:
        DataError: The file is damaged or of another version.
    """
    file = open_arrow_file(path, fix)
    metadata = file.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        raise DataError(f"{path} was not written by this version: {fix}")
    if file.schema != SCHEMA:
        raise DataError(f"{path} is damaged (its columns are not those of an index): {fix}")
    try:
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        return batches, metadata, file.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): {fix}") from error


@contextmanager
def malformed_is_data_error(path: Path, fix: str) -> Iterator[None]:
    """Turn the errors of reading a file's JSON into a DataError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged (its description of shards cannot be read: {error!r}): {fix}") from error


def parse_header(fields: dict[str, Any]) -> IndexHeader:
    """Return the header of its JSON fields.

    Raises:
        TypeError: A field is missing, unknown or not a string.
        ValueError: The fingerprint is malformed.
    """
    header = IndexHeader(**fields)
    if not all(isinstance(value, str) for value in asdict(header).values()):
        raise TypeError("a field of the header is not a string")
    size_in(header.tar_fingerprint)
    return header


def sample_at(batch: pa.RecordBatch, row: int) -> ShardSample:
    """Return where the sample of a row lies in its tar."""
    members = [Member(**member) for member in structs_at(batch, row, "members")]
    return ShardSample(batch.column("key")[row].as_py(), members)


def structs_at(batch: pa.RecordBatch, row: int, column: str) -> list[dict[str, Any]]:
    """Return the list of structs of a row in a column."""
    return batch.column(column)[row].as_py()


def _video_fields(info: VideoInfo, pairs: int) -> dict[str, Any]:
    fields = {name: getattr(info, name) for name in ("frames", "fps", "duration", "height", "width")}
    return {**fields, "pairs": pairs}
