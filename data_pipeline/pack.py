"""First-fit packing: every item goes to the first pack that still has room for it.

pack_first_fit([5, 4, 3, 3, 1], capacity=8)  ->  [[0, 2], [1, 3, 4]]
"""

from __future__ import annotations

from collections.abc import Sequence


def pack_first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the items of each pack, in the order given. No size may exceed capacity.

    O(n log n): a binary tree over packs holds the largest room below each node, so the leftmost pack with enough room
    is found from the root down. Packs not begun yet have all their room, so a pack is always found.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    packs: list[list[int]] = []
    for item, size in enumerate(sizes):
        if size > capacity:
            raise ValueError(f"item {item} of size {size} cannot fit a pack of {capacity}")
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        pack = node - leaves
        if pack == len(packs):
            packs.append([])
        packs[pack].append(item)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs
