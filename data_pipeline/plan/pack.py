"""Packing: place pieces in a given number of packs that are full and cost about the same.

Attention costs the square of a piece's length. So a pack with one long piece costs more than a pack with many short
ones, and a piece as long as a pack cannot be balanced at all. The remedy is to put the long pieces in a few `heavy`
packs, which ranks then process at the same time, and to make all other packs equal. Pieces are placed from the longest
to the shortest:

    long pieces      fill the `heavy` packs, each in the pack with the least space that suffices (best fit);
    the next ones    are spread over the other packs, each in the pack with the most space left;
    the shortest     fill all gaps, best fit.

    pack([5, 4, 3, 3, 1], capacity=8, packs=2)  ->  [0, 1, 0, 1, 1]
"""

from __future__ import annotations

from heapq import heapreplace

import numpy as np

SPREAD_SHARE = 0.65  # share of all tokens in the first two groups
LONG_SHARE = 1 / 8  # a piece is long if it takes more than this share of a pack


def pack(
    sizes: np.ndarray, *, capacity: int, packs: int, heavy: int = 0, spread_share: float = SPREAD_SHARE
) -> np.ndarray:
    """Choose a pack for each piece.

    With heavy=0 and spread_share=0 this is best-fit decreasing, except that no pack stays empty while another holds
    two pieces.

    Args:
        sizes: int [pieces], each from 1 to `capacity`.
        capacity: Size of a pack.
        packs: Number of packs.
        heavy: How many packs, the first ones, take the long pieces.
        spread_share: Share of the total size that is placed before the gaps are filled.

    Returns:
        int64 [pieces], the pack of each, or -1 if no pack has enough space.
    """
    order = np.argsort(-sizes, kind="stable")
    falling = sizes[order]
    spread = int(np.searchsorted(np.cumsum(falling), spread_share * falling.sum(), side="right"))
    long = int(np.searchsorted(-falling[:spread], -capacity * LONG_SHARE, side="right"))
    pieces = falling.tolist()

    space = _SpaceLeft(capacity)
    for number in reversed(range(heavy)):
        space.add(capacity, number)
    chosen = [space.best_fit(size) for size in pieces[:long]] + [-1] * (spread - long)

    emptiest = [(-capacity, number) for number in range(heavy, packs)]  # a heap of (-space left, pack)
    for index in range(spread if emptiest else 0):
        negative_space = emptiest[0][0] + pieces[index]
        if chosen[index] < 0 and negative_space <= 0:
            chosen[index] = emptiest[0][1]
            heapreplace(emptiest, (negative_space, chosen[index]))

    for negative_space, number in emptiest:
        space.add(-negative_space, number)
    for index in range(spread):
        if chosen[index] < 0:
            chosen[index] = space.best_fit(pieces[index])
    chosen += map(space.best_fit, pieces[spread:])

    result = np.empty(len(pieces), np.int64)
    result[order] = chosen
    _fill_empty(result, packs)
    return result


def _fill_empty(chosen: np.ndarray, packs: int) -> None:
    """Give every empty pack a piece of a pack that has more than one."""
    empty = np.flatnonzero(np.bincount(chosen[chosen >= 0], minlength=packs) == 0)
    by_pack = np.argsort(chosen, kind="stable")
    spare = by_pack[1:][(np.diff(chosen[by_pack]) == 0) & (chosen[by_pack[1:]] >= 0)][: len(empty)]
    chosen[spare] = empty[: len(spare)]


class _SpaceLeft:
    """Packs by the space they have left.

    Bit n of one integer says whether any pack has n left, so a shift finds the least space that suffices.
    """

    def __init__(self, capacity: int) -> None:
        self._packs: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._bits = [1 << space for space in range(capacity + 1)]
        self._present = 0

    def add(self, space: int, pack: int) -> None:
        self._packs[space].append(pack)
        self._present |= self._bits[space]

    def best_fit(self, size: int) -> int:
        """Take `size` from a pack with the least space that suffices, and return the pack; -1 if there is none."""
        enough = self._present >> size
        if not enough:
            return -1
        left = (enough & -enough).bit_length() - 1
        packs = self._packs[size + left]
        pack = packs.pop()
        if not packs:
            self._present ^= self._bits[size + left]
        self._packs[left].append(pack)
        self._present |= self._bits[left]
        return pack
