"""`Source`: all shards of one source as one long table of samples, which the plan draws from and workers read by."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.media.image_sizes import patches_of
from data_pipeline.media.images import MERGE_SIZE, TEMPORAL_PATCH_SIZE
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.shards.catalogue import ShardEntry, open_shards
from data_pipeline.shards.index import sample_at, structs_at
from data_pipeline.shards.members import ShardSample, index_command
from data_pipeline.shards.shard_cache import ShardCache, shown, url_in

PATCHES_PER_TOKEN = MERGE_SIZE**2


@dataclass(frozen=True)
class StoredSample:
    """Where a sample lies. shard: path or URL of the tar; tar_fingerprint: of the tar as it was indexed."""

    shard: str
    shard_name: str
    sample: ShardSample
    chat_form: str
    tar_fingerprint: str


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
        self._folder, self.shards, table = open_shards(config.path, cache or ShardCache())
        for shard in self.shards:
            if shard.header.tokenizer_hash != tokenizer_hash:
                made = "another tokenizer" if shard.header.tokenizer_hash else "no tokenizer"
                place = shown(self._place(shard))
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
        sample = sample_at(*self._locate(row))
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
        for block in structs_at(*self._locate(row), "blocks"):
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
        return url_in(self._folder, shard.name)

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
