"""The index beside every shard: all that the plan must know about samples, without opening the tar.

NAME.tar has NAME.index.arrow, an Arrow IPC file with one row a usable sample (columns: SCHEMA). Its metadata says
which tar it describes, which tokenizer counted the text and in which form chats were written. Tokens of images are not
stored: they follow from sizes and the pixel budget of the run.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.config import SourceConfig
from data_pipeline.encode import PixelBudget
from data_pipeline.errors import DataError
from data_pipeline.images import grid_of, resized_size, tokens_of
from data_pipeline.shards import Member, ShardSample, index_command
from data_pipeline.video import VideoInfo, VideoLayout, plan_video

FORMAT = "glmv-index-1"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("domain", pa.string()),
        ("text_tokens", pa.int32()),  # all tokens but <|image|>: text, special tokens, timestamps
        ("images", pa.list_(pa.struct([("height", pa.int32()), ("width", pa.int32())]))),  # upright, before resizing
        (
            "videos",
            pa.list_(
                pa.struct(
                    [
                        ("frames", pa.int64()),
                        ("fps", pa.float64()),
                        ("duration", pa.float64()),
                        ("height", pa.int32()),
                        ("width", pa.int32()),
                    ]
                )
            ),
        ),
        (
            "members",
            pa.list_(
                pa.struct([("kind", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("crc32", pa.uint32())])
            ),
        ),
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
        fields = self.table.slice(row, 1).select(["key", "members"]).to_pylist()[0]
        return ShardSample(fields["key"], [Member(**member) for member in fields["members"]])


@dataclass(frozen=True)
class StoredSample:
    """Where one sample lies. shard: path of its tar."""

    shard: str
    shard_name: str
    sample: ShardSample
    chat_form: str


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.arrow")


def fingerprint(tar: Path) -> str:
    """Size and checksum of both ends: changes when a tar is rewritten, not when it is copied or touched."""
    size = tar.stat().st_size
    with open(tar, "rb") as file:
        head = file.read(65536)
        tail = os.pread(file.fileno(), 65536, max(0, size - 65536))
    return f"{size}-{zlib.crc32(tail, zlib.crc32(head)):08x}"


def index_row(
    sample: ShardSample, domain: str, text_tokens: int, images: Iterable[tuple[int, int]], videos: Iterable[VideoInfo]
) -> dict[str, Any]:
    """A row of SCHEMA. images: (height, width) of each."""
    return {
        "key": sample.key,
        "domain": domain,
        "text_tokens": text_tokens,
        "images": [{"height": height, "width": width} for height, width in images],
        "videos": [asdict(info) for info in videos],
        "members": [asdict(member) for member in sample.members],
    }


def write_index(tar: Path, rows: list[dict[str, Any]], *, tokenizer_hash: str, chat_form: str) -> None:
    header = IndexHeader(fingerprint(tar), tokenizer_hash, chat_form)
    metadata = {"format": FORMAT, "header": json.dumps(asdict(header))}
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))
    temporary = index_path(tar).with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, index_path(tar))


def read_index(tar: Path) -> ShardIndex:
    """Opens a shard's index (memory-mapped). Raises DataError if it is missing, damaged, or of another tar."""
    path, mend = index_path(tar), f"run {index_command(tar)}"
    if not tar.is_file():
        raise DataError(f"shard {tar} is missing although {path.name} is there: restore it, or delete its index")
    if not path.is_file():
        raise DataError(f"shard {tar} has no index: {mend}")
    try:
        with pa.memory_map(str(path)) as file:  # the table keeps the mapping, so closing only saves a descriptor
            table = pa.ipc.open_file(file).read_all()
        metadata = table.schema.metadata or {}
        if metadata.get(b"format") != FORMAT.encode():
            raise DataError(f"{path} was not written by this version: {mend}")
        header = IndexHeader(**json.loads(metadata[b"header"]))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): {mend}") from error
    if header.tar_fingerprint != fingerprint(tar):
        raise DataError(f"{path} is older than its shard, which has changed since: {mend}")
    return ShardIndex(tar, header, table)


def find_shards(path: str) -> list[Path]:
    """The tars that a source's path stands for: a folder, one file, or a pattern. Raises DataError if there is none."""
    given = Path(path)
    if given.is_dir():
        # An index without its tar counts as a shard, so that read_index can say which one is missing.
        indexed = [
            index.with_name(index.name.removesuffix(".index.arrow") + ".tar") for index in given.glob("*.index.arrow")
        ]
        shards = sorted({*given.glob("*.tar"), *indexed})
    elif any(character in path for character in "*?["):
        shards = sorted(given.parent.glob(given.name))
    elif given.is_file():
        shards = [given]
    else:
        raise DataError(f"{path} does not exist: data.sources[].path must be a folder of shards, a .tar or a pattern")
    if not shards:
        raise DataError(f"{path} holds no shards (*.tar): make some with `python -m tools.shard build`")
    return shards


class Source:
    """All shards of one source as one long table of samples, numbered from 0 in shard order.

    lengths: int64 [samples], tokens of each after images are expanded. is_text: bool [samples], of domain `text`, which
    may be cut. Raises DataError if a shard or its index cannot be used, or was made with another tokenizer.
    """

    def __init__(self, config: SourceConfig, *, tokenizer_hash: str, budget: PixelBudget):
        self.label, self.weight = config.label(), config.weight
        self._budget = budget
        self.shards = [read_index(shard) for shard in find_shards(config.path)]
        for shard in self.shards:
            if shard.header.tokenizer_hash != tokenizer_hash:
                made = "another tokenizer" if shard.header.tokenizer_hash else "no tokenizer"
                raise DataError(f"the index of {shard.file} was made with {made}: run {index_command(shard.file)}")
        self.shard_rows = np.cumsum([0] + [shard.table.num_rows for shard in self.shards])
        self.lengths = np.concatenate([sample_lengths(shard.table, budget) for shard in self.shards])
        domains = [shard.table.column("domain") for shard in self.shards]
        self.is_text = np.concatenate([pc.equal(column, "text").to_numpy() for column in domains])

    def __len__(self) -> int:
        return int(self.shard_rows[-1])

    def locate(self, row: int) -> tuple[ShardIndex, int]:
        """The shard that holds sample `row`, and its row there."""
        shard = int(np.searchsorted(self.shard_rows, row, side="right")) - 1
        return self.shards[shard], row - int(self.shard_rows[shard])

    def sample(self, row: int) -> StoredSample:
        shard, place = self.locate(row)
        return StoredSample(str(shard.file), shard.file.name, shard.sample(place), shard.header.chat_form)

    def image_patches(self, row: int) -> list[int]:
        """Patches of each picture and frame pair of sample `row`."""
        shard, place = self.locate(row)
        media = shard.table.slice(place, 1).select(["images", "videos"]).to_pylist()[0]
        grids = [_image_grid(image["height"], image["width"], self._budget) for image in media["images"]]
        for layout in (_video_layout(budget=self._budget, **video) for video in media["videos"]):
            grids += [layout.grid] * len(layout.seconds)
        return [h * w for h, w in grids]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when samples are added, removed, reordered or take another number of tokens."""
        names = "/".join(f"{shard.file.name}:{shard.table.num_rows}" for shard in self.shards)
        return f"{zlib.crc32(self.lengths.tobytes(), zlib.crc32(names.encode())):08x}"


def sample_lengths(table: pa.Table, budget: PixelBudget) -> np.ndarray:
    """int64 [rows]: tokens of every sample, from metadata alone."""

    def image_tokens(height: float, width: float) -> int:
        return tokens_of(_image_grid(height, width, budget))

    def video_tokens(frames: float, fps: float, duration: float, height: float, width: float) -> int:
        layout = _video_layout(frames, fps, duration, height, width, budget)
        return len(layout.seconds) * tokens_of(layout.grid)

    lengths = table.column("text_tokens").to_numpy().astype(np.int64)
    return lengths + _media_tokens(table, "images", image_tokens) + _media_tokens(table, "videos", video_tokens)


def _image_grid(height: float, width: float, budget: PixelBudget) -> tuple[int, int]:
    return grid_of(resized_size(int(height), int(width), max_tokens=budget.image_max_tokens))


def _video_layout(
    frames: float, fps: float, duration: float, height: float, width: float, budget: PixelBudget
) -> VideoLayout:
    return plan_video(VideoInfo(int(frames), fps, duration, int(height), int(width)), budget.video_max_tokens)


def _media_tokens(table: pa.Table, column: str, tokens_of_one: Callable[..., int]) -> np.ndarray:
    """int64 [rows]: tokens of all media in a column of lists of structs; every distinct struct is worked out once."""
    lists = table.column(column).combine_chunks()
    media = np.stack([values.to_numpy().astype(np.float64) for values in lists.flatten().flatten()], axis=1)
    kinds, kind = np.unique(media, axis=0, return_inverse=True)
    tokens = np.array([tokens_of_one(*values) for values in kinds.tolist()], dtype=np.int64)[kind.reshape(-1)]
    before = np.concatenate([[0], np.cumsum(tokens)])
    ends = np.cumsum(lists.value_lengths().to_numpy())
    return before[ends] - before[np.concatenate([[0], ends])[:-1]]
