"""The index beside every shard, and the catalogue of a folder of shards: all that the plan must know about samples,
without opening a tar.

    shards/caption-00000.tar            the samples
    shards/caption-00000.index.arrow    a row for each of them: SCHEMA, in an Arrow IPC file
    shards/catalogue.arrow              the rows of all indexes of the folder, one after the other

An index says which tar it describes, which tokenizer counted the text and in which form chats were written; a catalogue
says so of every shard. Training opens the catalogue alone, memory-mapped, so that 10,000 shards cost one listing of
their folder. Whoever writes an index removes the catalogue, and `write_catalogue` makes it anew at the end.

Tokens of images are not stored: they follow from sizes and the pixel budget of the run.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.config import SourceConfig
from data_pipeline.encode import PixelBudget
from data_pipeline.errors import DataError
from data_pipeline.images import MERGE_SIZE, TEMPORAL_PATCH_SIZE
from data_pipeline.remote import ShardCache, is_url
from data_pipeline.shards import Member, ShardSample, index_command
from data_pipeline.sizes import patches_of
from data_pipeline.tar import fingerprint
from data_pipeline.video import VideoInfo, frame_indices

FORMAT = "glmv-index-2"
CATALOGUE = "catalogue.arrow"
INDEX_SUFFIX = ".index.arrow"
BATCH_ROWS = 16384  # rows of a record batch: what is worked on at once
PATCHES_PER_TOKEN = MERGE_SIZE**2


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
        return _sample(self.table.slice(row, 1).to_batches()[0], 0)


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the catalogue knows it. name: of the tar; rows: how many."""

    name: str
    rows: int
    header: IndexHeader


@dataclass(frozen=True)
class StoredSample:
    """Where a sample lies. shard: path or URL of the tar; tar_fingerprint: of the tar as it was indexed."""

    shard: str
    shard_name: str
    sample: ShardSample
    chat_form: str
    tar_fingerprint: str


# --- the index of a shard ---------------------------------------------------------------------------------------------


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
    temporary = index_path(tar).with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(rows), BATCH_ROWS):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + BATCH_ROWS], schema=schema))
    (tar.parent / CATALOGUE).unlink(missing_ok=True)
    os.replace(temporary, index_path(tar))


def read_index(tar: Path) -> ShardIndex:
    """Opens a shard's index (memory-mapped). Raises DataError if it is missing, damaged, or of another tar."""
    path, mend = index_path(tar), f"run {index_command(tar)}"
    if not tar.is_file():
        raise DataError(f"shard {tar} is missing although {path.name} is there: restore it, or delete its index")
    if not path.is_file():
        raise DataError(f"shard {tar} has no index: {mend}")
    index = _open_index(tar, mend)
    if index.header.tar_fingerprint != fingerprint(tar):
        raise DataError(f"{path} is older than its shard, which has changed since: {mend}")
    return index


def _open_index(tar: Path, mend: str) -> ShardIndex:
    batches, metadata, _ = _read_arrow(index_path(tar), mend)
    return ShardIndex(tar, IndexHeader(**json.loads(metadata[b"header"])), pa.Table.from_batches(batches, SCHEMA))


def _read_arrow(path: Path, mend: str) -> tuple[list[pa.RecordBatch], dict[bytes, bytes], dict[bytes, bytes]]:
    """Rows of an Arrow file of this module, memory-mapped, and the metadata of its head and of its end.

    Raises DataError if it is damaged or of another version."""
    try:
        with pa.memory_map(str(path)) as mapped:  # the batches keep the mapping: closing only saves a descriptor
            file = pa.ipc.open_file(mapped)
            metadata = file.schema.metadata or {}
            if metadata.get(b"format") != FORMAT.encode():
                raise DataError(f"{path} was not written by this version: {mend}")
            if file.schema != SCHEMA:
                raise DataError(f"{path} is damaged (its columns are not those of an index): {mend}")
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
            return batches, metadata, file.metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): {mend}") from error


# --- the catalogue of a folder ----------------------------------------------------------------------------------------


def write_catalogue(folder: Path) -> None:
    """Puts the rows of all indexes of a folder, in the order of their names, into its catalogue. Raises DataError if an
    index is damaged or of another version."""

    def indexes() -> Iterator[ShardIndex]:
        return (_open_index(tar, f"run {index_command(tar)}") for tar in tars)

    names = sorted(name.removesuffix(INDEX_SUFFIX) for name in os.listdir(folder) if name.endswith(INDEX_SUFFIX))
    tars = [folder / f"{name}.tar" for name in names]
    entries = [{"name": index.file.name, "rows": index.table.num_rows, **asdict(index.header)} for index in indexes()]
    path = folder / CATALOGUE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two processes may end at once
    schema = SCHEMA.with_metadata({"format": FORMAT})
    with (
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema, metadata={"shards": json.dumps(entries)}) as writer,
    ):
        waiting: list[pa.Table] = []  # small shards share a batch
        for index in indexes():
            waiting.append(index.table)
            if sum(table.num_rows for table in waiting) >= BATCH_ROWS:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=BATCH_ROWS)
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=BATCH_ROWS)
    os.replace(temporary, path)


def read_catalogue(path: Path, mend: str) -> tuple[list[ShardEntry], pa.Table]:
    """The shards of a catalogue and their rows (memory-mapped). Raises DataError if it is damaged."""
    batches, _, footer = _read_arrow(path, mend)
    shards = [
        ShardEntry(entry.pop("name"), entry.pop("rows"), IndexHeader(**entry))
        for entry in json.loads(footer[b"shards"])
    ]
    table = pa.Table.from_batches(batches, SCHEMA)
    if table.num_rows != sum(shard.rows for shard in shards):
        raise DataError(f"{path} is damaged (its rows are not those of its shards): {mend}")
    return shards, table


# --- all shards of a source -------------------------------------------------------------------------------------------


def find_shards(path: str) -> list[Path]:
    """The tars that a source's path stands for: a folder, one file, or a pattern. Raises DataError if there is none."""
    folder, names, _ = _listing(path)
    return [folder / name for name in names]


def _listing(path: str) -> tuple[Path, list[str], set[str]]:
    """The folder of a source, the names of its tars in order, and the names of all of the folder's files.

    An index without its tar counts as a shard, so that whoever opens it can say which one is missing.
    """
    given = Path(path)
    if given.is_dir():
        folder, pattern = given, "*.tar"
    elif any(character in given.name for character in "*?["):
        folder, pattern = given.parent, given.name
    elif given.is_file():
        return given.parent, [given.name], set(os.listdir(given.parent))
    else:
        raise DataError(f"{path} does not exist: give a folder of shards, a .tar or a pattern")
    files = set(os.listdir(folder)) if folder.is_dir() else set()
    tars = {name for name in files if name.endswith(".tar")}
    tars |= {name.removesuffix(INDEX_SUFFIX) + ".tar" for name in files if name.endswith(INDEX_SUFFIX)}
    names = sorted(name for name in tars if fnmatchcase(name, pattern) and not name.startswith("."))
    if not names:
        raise DataError(f"{path} holds no shards (*.tar): make some with `python -m tools.shard build`")
    return folder, names, files


def _open_shards(path: str, cache: ShardCache) -> tuple[str, list[ShardEntry], pa.Table]:
    """The folder of a source, its shards in order, and their rows: from the catalogue where it knows all of them, else
    from the index of each."""
    if is_url(path):
        return _open_remote(path, cache)
    folder, names, files = _listing(path)
    if CATALOGUE in files:
        shards, rows = read_catalogue(folder / CATALOGUE, f"run {index_command(folder)}")
        present = {shard.name for shard in shards if {shard.name, _index_name(shard.name)} <= files}
        if present.issuperset(names):
            return str(folder), *_chosen(shards, rows, set(names))
    indexes = [read_index(folder / name) for name in names]
    shards = [ShardEntry(index.file.name, index.table.num_rows, index.header) for index in indexes]
    return str(folder), shards, pa.concat_tables([index.table for index in indexes])


def _open_remote(url: str, cache: ShardCache) -> tuple[str, list[ShardEntry], pa.Table]:
    """The same for a URL: of a folder, of a .tar in it, or with a pattern for its last part."""
    folder, pattern = url.rstrip("/"), "*.tar"
    last = folder.rpartition("/")[2]
    if last.endswith(".tar") or any(character in last for character in "*?["):
        folder, pattern = folder.rpartition("/")[0], last
    shards, rows = read_catalogue(cache.catalogue(f"{folder}/{CATALOGUE}"), f"write {folder}/{CATALOGUE} anew")
    names = {shard.name for shard in shards if fnmatchcase(shard.name, pattern)}
    if not names:
        raise DataError(f"{url} stands for none of the {len(shards)} shards in the catalogue of {folder}")
    return folder, *_chosen(shards, rows, names)


def _index_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + INDEX_SUFFIX


def _chosen(shards: Sequence[ShardEntry], rows: pa.Table, names: set[str]) -> tuple[list[ShardEntry], pa.Table]:
    """Only the shards of these names. Nothing is copied."""
    if len(names) == len(shards):
        return list(shards), rows
    firsts = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()
    kept = [(shard, first) for shard, first in zip(shards, firsts[:-1], strict=True) if shard.name in names]
    return [shard for shard, _ in kept], pa.concat_tables([rows.slice(first, shard.rows) for shard, first in kept])


class Source:
    """All shards of one source as one long table of samples, numbered from 0 in shard order.

    lengths: int32 [samples], tokens of each after images are expanded.
    patches: int32 [samples], vision patches of all of its pictures and frame pairs (of 2 instants each);
    patches_squared: int64 [samples], the sum of n*n over them.
    is_text: bool [samples], of domain `text`, which may be cut anywhere.
    domains: the names that occur; domain_codes: uint8 [samples], the place of a sample's domain among them.
    shard_rows: int64 [shards + 1], the first row of every shard, and the number of rows.

    Opening reads four columns of numbers; `sample`, `image_patches` and `blocks` look at one row. The rows themselves
    stay in memory-mapped files, and a Source travels to another process as its configuration, to be opened there again.
    Raises DataError if shards or indexes cannot be used, or were made with another tokenizer.
    """

    def __init__(
        self, config: SourceConfig, *, tokenizer_hash: str, budget: PixelBudget, cache: ShardCache | None = None
    ):
        self._arguments = (config, tokenizer_hash, budget, cache)
        self.label, self.weight, self.epochs = config.label(), config.weight, config.epochs
        self._budget = budget
        self._folder, self.shards, table = _open_shards(config.path, cache or ShardCache())
        for shard in self.shards:
            if shard.header.tokenizer_hash != tokenizer_hash:
                made = "another tokenizer" if shard.header.tokenizer_hash else "no tokenizer"
                place = self._place(shard)
                raise DataError(f"the index of {place} was made with {made}: run {index_command(place)}")
        self.shard_rows = np.cumsum([0, *(shard.rows for shard in self.shards)], dtype=np.int64)
        self._batches = table.to_batches()
        self._batch_rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)], dtype=np.int64)

        rows = len(self)
        self.lengths, self.patches = np.empty(rows, np.int32), np.empty(rows, np.int32)
        self.patches_squared = np.empty(rows, np.int64)
        self.domain_codes = np.empty(rows, np.uint8)
        codes: dict[str, int] = {}
        for batch, start in zip(self._batches, self._batch_rows[:-1].tolist(), strict=True):
            there = slice(start, start + batch.num_rows)
            self.lengths[there], self.patches[there], self.patches_squared[there] = _work(batch, budget)
            domains = batch.column("domain").dictionary_encode()
            known = [codes.setdefault(name, len(codes)) for name in domains.dictionary.to_pylist()]
            self.domain_codes[there] = np.array(known, np.uint8)[domains.indices.to_numpy()]
        self.domains = tuple(codes)
        self.is_text = self.domain_codes == codes.get("text", len(codes))

    def __len__(self) -> int:
        return int(self.shard_rows[-1])

    def __reduce__(self):
        return _reopen, self._arguments

    def sample(self, row: int) -> StoredSample:
        """Where sample `row` lies."""
        shard = self.shards[int(np.searchsorted(self.shard_rows, row, side="right")) - 1]
        header = shard.header
        sample = _sample(*self._locate(row))
        return StoredSample(self._place(shard), shard.name, sample, header.chat_form, header.tar_fingerprint)

    def domain_of(self, row: int) -> str:
        return self.domains[self.domain_codes[row]]

    def image_patches(self, row: int) -> list[int]:
        """Patches of each picture and then of each frame pair of sample `row`."""
        images, videos, pairs = self._media(row)
        return images + [patches for patches, count in zip(videos, pairs, strict=True) for _ in range(count)]

    def blocks(self, row: int) -> list[tuple[int, int]]:
        """(start, length) in tokens of each picture and clip of sample `row`, in order, their begin and end tokens
        included: what may not be cut through."""
        images, videos, pairs = self._media(row)
        image_tokens = iter([patches // PATCHES_PER_TOKEN for patches in images])
        video_tokens = iter([n // PATCHES_PER_TOKEN * count for n, count in zip(videos, pairs, strict=True)])
        found: list[tuple[int, int]] = []
        expanded = 0  # tokens of the images so far
        for block in _row(self._locate(row), "blocks"):
            tokens = next(video_tokens if block["video"] else image_tokens)
            found.append((block["before"] + expanded, block["within"] + tokens))
            expanded += tokens
        return found

    @cached_property
    def fingerprint(self) -> str:
        """8 hex digits: change when samples are added, removed, reordered or take another number of tokens."""
        names = "/".join(f"{shard.name}:{shard.rows}" for shard in self.shards)
        return f"{zlib.crc32(self.lengths.tobytes(), zlib.crc32(names.encode())):08x}"

    def _place(self, shard: ShardEntry) -> str:
        return f"{self._folder}/{shard.name}"

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        batch = int(np.searchsorted(self._batch_rows, row, side="right")) - 1
        return self._batches[batch], row - int(self._batch_rows[batch])

    def _media(self, row: int) -> tuple[list[int], list[int], list[int]]:
        """Patches of each picture, patches of a frame pair of each clip, and frame pairs of each clip."""
        batch, place = self._locate(row)
        images, videos, pairs = _patches(batch.slice(place, 1), self._budget)
        return images.tolist(), videos.tolist(), pairs.tolist()


def _reopen(config: SourceConfig, tokenizer_hash: str, budget: PixelBudget, cache: ShardCache | None) -> Source:
    return Source(config, tokenizer_hash=tokenizer_hash, budget=budget, cache=cache)


def sample_lengths(table: pa.Table, budget: PixelBudget) -> np.ndarray:
    """int64 [rows]: tokens of every sample, from metadata alone."""
    return np.concatenate([np.empty(0, np.int64), *(_work(batch, budget)[0] for batch in table.to_batches())])


# --- rows -------------------------------------------------------------------------------------------------------------


def _sample(batch: pa.RecordBatch, row: int) -> ShardSample:
    return ShardSample(batch.column("key")[row].as_py(), [Member(**member) for member in _row((batch, row), "members")])


def _row(place: tuple[pa.RecordBatch, int], column: str) -> list[dict[str, Any]]:
    batch, row = place
    return batch.column(column)[row].as_py()


def _work(batch: pa.RecordBatch, budget: PixelBudget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [rows] each: tokens, patches, and the sum over images of patches squared, of every sample."""
    images, videos, pairs = _patches(batch, budget)
    patches = _sums(batch, "images", images) + _sums(batch, "videos", videos * pairs)
    squared = _sums(batch, "images", images**2) + _sums(batch, "videos", videos**2 * pairs)
    return batch.column("text_tokens").to_numpy() + patches // PATCHES_PER_TOKEN, patches, squared


def _patches(batch: pa.RecordBatch, budget: PixelBudget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [pictures], patches of each; int64 [clips], patches of a frame pair; int32 [clips], how many pairs."""
    images = patches_of(*_fields(batch, "images", "height", "width"), max_tokens=budget.image_max_tokens)
    height, width, pairs = _fields(batch, "videos", "height", "width", "pairs")
    frames = pairs * TEMPORAL_PATCH_SIZE
    return images, patches_of(height, width, max_tokens=budget.video_max_tokens, frames=frames), pairs


def _fields(batch: pa.RecordBatch, column: str, *names: str) -> list[np.ndarray]:
    """Fields of all structs in a column of lists, one after the other. Nothing is copied."""
    structs = batch.column(column).flatten()
    return [structs.field(name).to_numpy() for name in names]


def _sums(batch: pa.RecordBatch, column: str, values: np.ndarray) -> np.ndarray:
    """int64 [rows]: the sum over each row's list of values [structs]."""
    ends = batch.column(column).offsets.to_numpy()
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return before[ends[1:] - ends[0]] - before[ends[:-1] - ends[0]]


def _frame_pairs(info: VideoInfo) -> int:
    return len(frame_indices(info.frames, info.fps, info.duration)) // TEMPORAL_PATCH_SIZE
