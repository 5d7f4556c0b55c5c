"""The samples of shards that tools.view shows: which ones, and each as it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeVar

from data_pipeline.encoding.encode import encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.reader import ShardReader
from tools.view_content import SequenceView, view_of_failure, view_of_sample

_T = TypeVar("_T")


def spread(indexes: Sequence[ShardIndex], samples: int) -> list[tuple[ShardIndex, int]]:
    """Choose samples at equal distances: the same number from every shard, or all of a shard that has fewer.

    If there are more shards than samples, choose samples at equal distances through all shards.
    """
    rows = [[(shard, row) for row in range(shard.table.num_rows)] for shard in indexes]
    if samples < len(rows):
        return _evenly(list(chain.from_iterable(rows)), samples)
    shares = dict.fromkeys(range(len(rows)), 0)
    left = samples
    for done, shard in enumerate(sorted(shares, key=lambda shard: len(rows[shard]))):
        shares[shard] = min(len(rows[shard]), left // (len(rows) - done))
        left -= shares[shard]
    return [chosen for shard, share in shares.items() for chosen in _evenly(rows[shard], share)]


def _evenly(rows: Sequence[_T], count: int) -> list[_T]:
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def with_keys(indexes: Sequence[ShardIndex], keys: Sequence[str]) -> list[tuple[ShardIndex, int]]:
    chosen: list[tuple[ShardIndex, int]] = []
    missing = set(keys)
    for shard in indexes:
        for row, key in enumerate(shard.table.column("key").to_pylist()):
            if found := {key, f"{shard.file.name}/{key}"}.intersection(keys):
                chosen.append((shard, row))
                missing -= found
    if missing:
        raise DataError(
            f"--key: no sample is called {' or '.join(sorted(missing))}: give KEY or SHARD.tar/KEY as a run's logs do"
        )
    return chosen


def views_of(
    chosen: Iterable[tuple[ShardIndex, int]], tokenizer: GlmTokenizer, budget: PixelBudget
) -> list[SequenceView]:
    """Return samples as they are shown, each from its shard and row; one that cannot be read as its reason."""
    reader = ShardReader()
    views = [_view(reader, shard, row, tokenizer, budget) for shard, row in chosen]
    reader.close()
    return views


def _view(
    reader: ShardReader, shard: ShardIndex, row: int, tokenizer: GlmTokenizer, budget: PixelBudget
) -> SequenceView:
    stored = shard.sample(row)
    name = f"{shard.file.name}/{stored.key}"
    try:
        raw = reader.read(str(shard.file), stored)
        encoded = encode_record(
            raw.record,
            raw.images,
            raw.videos,
            tokenizer=tokenizer,
            budget=budget,
            sample_id=name,
            chat_form=shard.header.chat_form,
        )
    except BadSample as error:
        return view_of_failure(name, error)
    return view_of_sample(encoded, tokenizer, raw.record)
