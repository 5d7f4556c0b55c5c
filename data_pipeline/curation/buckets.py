"""Finding what repeats among many without comparing all pairs: only what shares a bucket is compared.

Items are put into buckets by several tables, such that two alike items share a bucket in at least one table. Then they
are gone through in order: an item repeats an earlier KEPT one of its bucket that is alike, or is kept itself. So what
goes is always like something that stays: chains of small differences do not carry anything away, and a thousand copies
cost as much as two.

With tables of (first two letters) and (last two letters), and "alike" meaning one letter differs:

    0 wood  kept        wo-  -od
    1 word  repeats 0   wo-  -rd        shares wo- with 0
    2 ford  kept        fo-  -rd        shares -rd with 1, which was not kept

An owner has one item or more (the pictures of a sample) and goes when each of its items repeats one of an earlier kept
owner. Memory is 4 bytes an item and table, and little more for items alone in their bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np

# (item, one or more earlier items of its buckets, ascending) -> the first of them that is like it, or None.
FirstAlike = Callable[[int, list[int]], int | None]


def bucket_numbers(keys: np.ndarray) -> np.ndarray:
    """Keys [items] of any dtype -> int32 [items]: equal keys have equal numbers, keys that occur once have -1."""
    _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.where(counts[numbers] > 1, numbers, -1).astype(np.int32)


def repeats_of(owners: np.ndarray, tables: Sequence[np.ndarray], first_alike: FirstAlike) -> dict[int, int]:
    """Owners that go -> the earlier owner that their first item repeats.

    owners: int64 [items], ascending: whose item it is. tables: the bucket_numbers of every table.
    """
    found: dict[int, int] = {}
    if not len(owners):
        return found
    kept: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in tables]
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    stops = np.r_[starts[1:], len(owners)]
    # An owner whose items are all alone in their buckets is like nothing: it need not be looked at.
    met = np.logical_or.reduceat(np.logical_or.reduce([table >= 0 for table in tables]), starts)
    for start, stop in zip(starts[met].tolist(), stops[met].tolist(), strict=True):
        numbers = {item: [table.item(item) for table in tables] for item in range(start, stop)}
        buckets = {
            item: [kept[table][bucket] for table, bucket in enumerate(own) if bucket >= 0]
            for item, own in numbers.items()
        }
        originals = [_first_alike(item, own, first_alike) for item, own in buckets.items()]
        if originals[0] is not None and None not in originals:
            found[int(owners[start])] = int(owners[originals[0]])
        else:
            for item, own in buckets.items():
                for bucket in own:
                    bucket.append(item)
    return found


def sharing_is_enough(item: int, others: list[int]) -> int | None:
    """The FirstAlike of buckets that hold equal items only."""
    return others[0]


def _first_alike(item: int, buckets: list[list[int]], first_alike: FirstAlike) -> int | None:
    others = sorted(set().union(*buckets))
    return first_alike(item, others) if others else None


def hamming_tables(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Tables in which any two 64-bit hashes that differ in at most `distance` bits share a bucket: exact, by the
    pigeonhole principle. Cut into distance + extra blocks of bits, two such hashes agree on at least `extra` of them;
    one table for every choice of `extra` blocks (Manku, Jain, Das Sarma 2007). More of them make smaller buckets.

    hashes: uint64 [items].
    """
    masks = min((_masks(distance, extra) for extra in (1, 2, 3)), key=lambda masks: _expected_work(masks, len(hashes)))
    return [bucket_numbers(hashes & np.uint64(mask)) for mask in masks]


def _masks(distance: int, extra: int) -> list[int]:
    blocks = distance + extra
    edges = [64 * block // blocks for block in range(blocks + 1)]
    block_masks = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    return [sum(chosen) for chosen in combinations(block_masks, extra)]


def _expected_work(masks: Sequence[int], items: int) -> float:
    """Steps an item: one a table, and one for everything that shares its bucket there, were the bits random."""
    return sum(1 + items / 2 ** mask.bit_count() for mask in masks)
