"""Repeated items among many, without comparing all pairs: only items that share a bucket are compared.

Several tables put items into buckets, so that two similar items share a bucket in at least one table. Items are then
processed in order: an item repeats the first similar KEPT item of its buckets, or is kept itself. So each removed item
is similar to one that is kept: a chain of small differences removes nothing, and a thousand copies cost as much as two.

With tables of the first two and the last two letters, where "similar" means that one letter differs:

    0 wood  kept        wo-  -od
    1 word  repeats 0   wo-  -rd        shares wo- with 0
    2 ford  kept        fo-  -rd        shares -rd with 1, which was not kept

An owner has one or more items (the images of a sample). It is removed if each of its items repeats one of an earlier
kept owner. Memory is 4 bytes per item and table, and little more for items that are alone in their bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np

# (item, earlier items of its buckets, at least one, ascending) -> the first of them that is similar, or None.
FirstSimilar = Callable[[int, list[int]], int | None]


def bucket_numbers(keys: np.ndarray) -> np.ndarray:
    """Return a number per key: equal keys have equal numbers, and a key that occurs once has -1.

    Args:
        keys: [items] of any dtype.

    Returns:
        int32 [items].
    """
    _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.where(counts[numbers] > 1, numbers, -1).astype(np.int32)


def repeats_of(owners: np.ndarray, tables: Sequence[np.ndarray], first_similar: FirstSimilar) -> dict[int, int]:
    """Return the owners to remove, each with the earlier owner that its first item repeats.

    Args:
        owners: int64 [items], ascending: the owner of each item.
        tables: The bucket_numbers of every table.
        first_similar: Compares an item with earlier ones.
    """
    found: dict[int, int] = {}
    if not len(owners):
        return found
    kept: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in tables]
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    stops = np.r_[starts[1:], len(owners)]
    # An owner whose items are all alone in their buckets is similar to nothing: skip it.
    shared = np.logical_or.reduceat(np.logical_or.reduce([table >= 0 for table in tables]), starts)
    for start, stop in zip(starts[shared].tolist(), stops[shared].tolist(), strict=True):
        numbers = {item: [table.item(item) for table in tables] for item in range(start, stop)}
        buckets = {
            item: [kept[table][bucket] for table, bucket in enumerate(own) if bucket >= 0]
            for item, own in numbers.items()
        }
        originals = [_first_similar(item, own, first_similar) for item, own in buckets.items()]
        if originals[0] is not None and None not in originals:
            found[int(owners[start])] = int(owners[originals[0]])
        else:
            for item, own in buckets.items():
                for bucket in own:
                    bucket.append(item)
    return found


def first_of_bucket(item: int, others: list[int]) -> int | None:
    """Return the first item: the FirstSimilar of tables whose buckets contain equal items only."""
    return others[0]


def _first_similar(item: int, buckets: list[list[int]], first_similar: FirstSimilar) -> int | None:
    others = sorted(set().union(*buckets))
    return first_similar(item, others) if others else None


def hamming_tables(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Return tables in which two 64-bit hashes that differ in at most `distance` bits share a bucket.

    Args:
        hashes: uint64 [items].
        distance: Bits.

    Returns:
        The bucket numbers of each table, int32 [items].
    """
    return [bucket_numbers(hashes & np.uint64(mask)) for mask in hamming_masks(distance, len(hashes))]


def hamming_masks(distance: int, items: int) -> list[int]:
    """Return 64-bit masks: two hashes that differ in at most `distance` bits are equal under at least one of them.

    Divided into distance + extra blocks of bits, two such hashes agree on at least `extra` blocks, by the pigeonhole
    principle. There is one mask per choice of `extra` blocks (Manku, Jain, Das Sarma 2007). A larger `extra` gives more
    masks and smaller buckets; the one with the least work for this number of items is used.
    """
    return min((_masks(distance, extra) for extra in (1, 2, 3)), key=lambda masks: _expected_work(masks, items))


def _masks(distance: int, extra: int) -> list[int]:
    blocks = distance + extra
    edges = [64 * block // blocks for block in range(blocks + 1)]
    block_masks = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    return [sum(chosen) for chosen in combinations(block_masks, extra)]


def _expected_work(masks: Sequence[int], items: int) -> float:
    """Return steps per item for random hashes: one per table, and one per item that shares a bucket."""
    return sum(1 + items / 2 ** mask.bit_count() for mask in masks)
