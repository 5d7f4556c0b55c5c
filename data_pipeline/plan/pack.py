"""Packing: pieces into a given number of packs, full to the brim and alike in what they cost.

Attention costs the square of a piece's length, so a pack with one long piece costs more than one with many short ones,
and nothing can be done about a piece as long as a pack. What can be done is to have few such packs, which then meet
each other in a micro-step, and to make all others alike. Pieces are taken from the longest to the shortest:

    long pieces      fill the `heavy` packs, each where the least room is left (best fit);
    further ones     are spread over the other packs, each where the most room is left;
    the shortest     fill all gaps, each where the least room is left.

    pack([5, 4, 3, 3, 1], capacity=8, packs=2)  ->  [0, 1, 0, 1, 1]
"""

from __future__ import annotations

from heapq import heapreplace

import numpy as np

SPREAD_SHARE = 0.65  # of all tokens: the long and further ones
LONG_SHARE = 1 / 8  # of the capacity: what is shorter goes to no heavy pack before the gaps are filled


def pack(
    sizes: np.ndarray, *, capacity: int, packs: int, heavy: int = 0, spread_share: float = SPREAD_SHARE
) -> np.ndarray:
    """int64 [pieces]: the pack of each, -1 where none has room. sizes: int [pieces], from 1 to capacity.

    Without `heavy` and spread_share this is best-fit decreasing, but that no pack stays empty while another has two.
    """
    order = np.argsort(-sizes, kind="stable")
    falling = sizes[order]
    spread = int(np.searchsorted(np.cumsum(falling), spread_share * falling.sum(), side="right"))
    long = int(np.searchsorted(-falling[:spread], -capacity * LONG_SHARE, side="right"))
    pieces = falling.tolist()

    rooms = _Rooms(capacity)
    for number in reversed(range(heavy)):
        rooms.add(capacity, number)
    chosen = [rooms.best_fit(size) for size in pieces[:long]] + [-1] * (spread - long)

    emptiest = [(-capacity, number) for number in range(heavy, packs)]  # a heap of (-room, pack)
    for place in range(spread if emptiest else 0):
        filled = emptiest[0][0] + pieces[place]
        if chosen[place] < 0 and filled <= 0:
            chosen[place] = emptiest[0][1]
            heapreplace(emptiest, (filled, chosen[place]))

    for filled, number in emptiest:
        rooms.add(-filled, number)
    for place in range(spread):
        if chosen[place] < 0:
            chosen[place] = rooms.best_fit(pieces[place])
    chosen += map(rooms.best_fit, pieces[spread:])

    result = np.empty(len(pieces), np.int64)
    result[order] = chosen
    _fill_empty(result, packs)
    return result


def _fill_empty(chosen: np.ndarray, packs: int) -> None:
    """Gives every empty pack a piece of a pack that has more."""
    empty = np.flatnonzero(np.bincount(chosen[chosen >= 0], minlength=packs) == 0)
    by_pack = np.argsort(chosen, kind="stable")
    spare = by_pack[1:][(np.diff(chosen[by_pack]) == 0) & (chosen[by_pack[1:]] >= 0)][: len(empty)]
    chosen[spare] = empty[: len(spare)]


class _Rooms:
    """Packs by the room they have left. Which rooms there are is kept as the bits of one integer, so that the least
    room that is enough is found by a shift."""

    def __init__(self, capacity: int):
        self._packs: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._bits = [1 << room for room in range(capacity + 1)]
        self._rooms = 0

    def add(self, room: int, pack: int) -> None:
        self._packs[room].append(pack)
        self._rooms |= self._bits[room]

    def best_fit(self, size: int) -> int:
        """Takes `size` from a pack with the least room that is enough; -1 if there is none."""
        enough = self._rooms >> size
        if not enough:
            return -1
        left = (enough & -enough).bit_length() - 1
        packs = self._packs[size + left]
        pack = packs.pop()
        if not packs:
            self._rooms ^= self._bits[size + left]
        self._packs[left].append(pack)
        self._rooms |= self._bits[left]
        return pack
