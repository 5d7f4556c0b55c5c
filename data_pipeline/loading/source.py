"""`Source`: all shards of one source as one long table of samples, used by the plan and by the data workers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from common.urls import shown, url_in
from data_pipeline.config import SourceConfig
from data_pipeline.encoding.generations import generation_of_hash
from data_pipeline.errors import DataError
from data_pipeline.media.image_sizes import patches_of
from data_pipeline.media.pixel_budget import PATCHES_PER_TOKEN, TEMPORAL_PATCH_SIZE, PixelBudget
from data_pipeline.shards.catalogue import ShardEntry, open_shards
from data_pipeline.shards.index import SCHEMA, sample_at, structs_at
from data_pipeline.shards.members import ShardSample, index_command
from data_pipeline.shards.shard_cache import ShardCache


@dataclass(frozen=True)
class StoredSample:
    """Where a sample is stored."""

    shard: str  # path or URL of the tar
    shard_name: str  # file name of the tar
    sample: ShardSample  # its members
    chat_form: str  # how chats of this shard are written
    tar_fingerprint: str  # of the tar as it was indexed


class Source:
    """All shards of one source as one long table of samples, numbered from 0 in shard order.

    Opening reads four columns; `sample`, `image_patches` and `blocks` read one row. The rows themselves stay
    in memory-mapped files. A Source is pickled as its arguments and opened again in the other process.

    Attributes:
        label: Name of the source.
        weight: Share of the tokens of the mixture, relative to the other sources.
        epochs: How often each sample is used; 0: endless.
        shards: The shards in order.
        lengths: int32 [samples], tokens of each sample, image tokens included.
        patches: int32 [samples], sum of patches over the images and frame pairs of a sample.
        patches_squared: int64 [samples], sum of the squares of their patches.
        is_text: bool [samples], whether the domain is `text`; such samples may be split at any token.
        domains: The names of the domains that occur.
        domain_codes: uint8 [samples], index of a sample's domain in `domains`.
        shard_rows: int64 [shards + 1], the first row of every shard, then the number of rows.
    """

    def __init__(
        self, config: SourceConfig, *, tokenizer_hash: str, budget: PixelBudget, cache: ShardCache | None = None
    ) -> None:
        """Open the indexes of a source.

        Args:
            config: Path, weight, name and epochs.
            tokenizer_hash: Of the run's tokenizer.
            budget: Limits the size of images and videos.
            cache: Where copies of remote catalogues are kept.

        Raises:
            DataError: Shards or indexes cannot be used, or were made with another tokenizer.
        """
        self._arguments = (config, tokenizer_hash, budget, cache)
        self.label, self.weight, self.epochs = config.label(), config.weight, config.epochs
        self._budget = budget
        self._folder, self.shards, table = open_shards(config.path, cache or ShardCache())
        for shard in self.shards:
            if shard.header.tokenizer_hash != tokenizer_hash:
                location, made = shown(self._location(shard)), _tokenizer_of(shard, tokenizer_hash)
                raise DataError(f"the index of {location} was made with {made}: run {index_command(location)}")
        self.shard_rows = np.cumsum([0, *(shard.rows for shard in self.shards)], dtype=np.int64)
        self._batches = table.to_batches()
        self._batch_rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)], dtype=np.int64)

        rows = len(self)
        self.lengths, self.patches = np.empty(rows, np.int32), np.empty(rows, np.int32)
        self.patches_squared = np.empty(rows, np.int64)
        self.domain_codes = np.empty(rows, np.uint8)
        codes: dict[str, int] = {}
        for batch, start in zip(self._batches, self._batch_rows[:-1].tolist(), strict=True):
            span = slice(start, start + batch.num_rows)
            self.lengths[span], self.patches[span], self.patches_squared[span] = _work(batch, budget)
            domains = batch.column("domain").dictionary_encode()
            known = [codes.setdefault(name, len(codes)) for name in domains.dictionary.to_pylist()]
            self.domain_codes[span] = np.array(known, np.uint8)[domains.indices.to_numpy()]
        self.domains = tuple(codes)
        self.is_text = self.domain_codes == codes.get("text", len(codes))

    def __len__(self) -> int:
        return int(self.shard_rows[-1])

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        return _reopen, self._arguments

    def sample(self, row: int) -> StoredSample:
        """Return where sample `row` is stored."""
        shard = self.shards[int(np.searchsorted(self.shard_rows, row, side="right")) - 1]
        header = shard.header
        sample = sample_at(*self._locate(row))
        return StoredSample(self._location(shard), shard.name, sample, header.chat_form, header.tar_fingerprint)

    def domain_of(self, row: int) -> str:
        """Return the domain of sample `row`."""
        return self.domains[self.domain_codes[row]]

    def image_patches(self, row: int) -> list[int]:
        """Return the patches of each image of sample `row`, then of each frame pair."""
        images, videos, pairs = self._media(row)
        return images + [patches for patches, count in zip(videos, pairs, strict=True) for _ in range(count)]

    def blocks(self, row: int) -> list[tuple[int, int]]:
        """Return (start, length) in tokens of each image and video of sample `row`, in order.

        Their begin and end tokens are included. A block must not be cut.
        """
        images, videos, pairs = self._media(row)
        image_tokens = iter([patches // PATCHES_PER_TOKEN for patches in images])
        video_tokens = iter([n // PATCHES_PER_TOKEN * count for n, count in zip(videos, pairs, strict=True)])
        found: list[tuple[int, int]] = []
        expanded = 0  # image tokens so far
        for block in structs_at(*self._locate(row), "blocks"):
            tokens = next(video_tokens if block["video"] else image_tokens)
            found.append((block["before"] + expanded, block["within"] + tokens))
            expanded += tokens
        return found

    @cached_property
    def fingerprint(self) -> str:
        """8 hex digits that change when samples are added, removed, reordered or take a different number of tokens.

        Independent of the path of the source.
        """
        names = "/".join(f"{shard.name}:{shard.rows}" for shard in self.shards)
        return f"{zlib.crc32(self.lengths.tobytes(), zlib.crc32(names.encode())):08x}"

    def checksums(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the checksums of the files of samples, part by part of the table.

        Yields:
            uint64 [files], of records, images and videos; int64 [rows + 1], where the files of each row begin.
        """
        for batch in self._batches:
            ends = batch.column("members").offsets.to_numpy().astype(np.int64)
            yield _fields(batch, "members", "xxh3")[0], ends - ends[0]

    def locations(self) -> Iterator[str]:
        """Yield the path or URL of every shard."""
        return map(self._location, self.shards)

    @property
    def has_media(self) -> bool:
        """Whether any sample has images or videos."""
        return bool(self.patches.any())

    @property
    def chat_forms(self) -> list[str]:
        """The forms in which the chats and prompts of this source are written, sorted; empty if it has none."""
        codes = [code for code, domain in enumerate(self.domains) if domain in ("chat", "rl")]
        rows = np.flatnonzero(np.isin(self.domain_codes, codes))
        shards = np.unique(np.searchsorted(self.shard_rows, rows, side="right") - 1)
        return sorted({self.shards[shard].header.chat_form for shard in shards.tolist()})

    def shard_tables(self) -> Iterator[tuple[ShardEntry, pa.Table]]:
        """Yield every shard with the rows of its index."""
        table = pa.Table.from_batches(self._batches, SCHEMA)
        for shard, first in zip(self.shards, self.shard_rows[:-1].tolist(), strict=True):
            yield shard, table.slice(first, shard.rows)

    def location_of(self, name: str) -> str:
        """Return the path or URL of a file beside the shards."""
        return url_in(self._folder, name)

    def _location(self, shard: ShardEntry) -> str:
        return self.location_of(shard.name)

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        batch = int(np.searchsorted(self._batch_rows, row, side="right")) - 1
        return self._batches[batch], row - int(self._batch_rows[batch])

    def _media(self, row: int) -> tuple[list[int], list[int], list[int]]:
        """Return the patches of each image, then per video: patches of a frame pair, and the number of frame pairs."""
        batch, offset = self._locate(row)
        images, videos, pairs = _patches(batch.slice(offset, 1), self._budget)
        return images.tolist(), videos.tolist(), pairs.tolist()


def _tokenizer_of(shard: ShardEntry, wanted: str) -> str:
    """Describe with which tokenizer an index was made that is not for the tokenizer of hash `wanted`."""
    if not shard.header.tokenizer_hash:
        return "no tokenizer"
    made, run = generation_of_hash(shard.header.tokenizer_hash), generation_of_hash(wanted)
    if made == run:
        return "another tokenizer"
    return f"the tokenizer of {made.models}, but data.tokenizer is that of {run.models}, which sees other video frames"


def _reopen(config: SourceConfig, tokenizer_hash: str, budget: PixelBudget, cache: ShardCache | None) -> Source:
    return Source(config, tokenizer_hash=tokenizer_hash, budget=budget, cache=cache)


def sample_lengths(table: pa.Table, budget: PixelBudget) -> np.ndarray:
    """Return int64 [rows]: tokens of every sample of an index, from metadata only."""
    return np.concatenate([np.empty(0, np.int64), *(_work(batch, budget)[0] for batch in table.to_batches())])


def _work(batch: pa.RecordBatch, budget: PixelBudget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return int64 [rows] each: tokens, patches, and the sum over images of patches squared, of every sample."""
    images, videos, pairs = _patches(batch, budget)
    patches = _sums(batch, "images", images) + _sums(batch, "videos", videos * pairs)
    squared = _sums(batch, "images", images**2) + _sums(batch, "videos", videos**2 * pairs)
    return batch.column("text_tokens").to_numpy() + patches // PATCHES_PER_TOKEN, patches, squared


def _patches(batch: pa.RecordBatch, budget: PixelBudget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return int64 [images], patches of each; int64 [videos], patches of a frame pair; int32 [videos], frame pairs."""
    images = patches_of(*_fields(batch, "images", "height", "width"), max_tokens=budget.image_max_tokens)
    height, width, pairs = _fields(batch, "videos", "height", "width", "pairs")
    frames = pairs * TEMPORAL_PATCH_SIZE
    return images, patches_of(height, width, max_tokens=budget.video_max_tokens, frames=frames), pairs


def _fields(batch: pa.RecordBatch, column: str, *names: str) -> list[np.ndarray]:
    """Return fields of all structs in a column of lists, concatenated. Nothing is copied."""
    structs = batch.column(column).flatten()
    return [structs.field(name).to_numpy() for name in names]


def _sums(batch: pa.RecordBatch, column: str, values: np.ndarray) -> np.ndarray:
    """Return int64 [rows]: the sum over each row's list of values [structs]."""
    ends = batch.column(column).offsets.to_numpy()
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return before[ends[1:] - ends[0]] - before[ends[:-1] - ends[0]]
