"""Making packs alike: pieces change places between packs, then packs are put in an order in which neighbours are alike.

Two measures count: what a pack costs in all, because the ranks meet in every micro-step, and how many vision patches
it has, because the vision towers are worked on before the decoder. All figures are whole numbers, so that every
machine comes to the same result.
"""

from __future__ import annotations

import numpy as np

UNIT = 1 << 16  # the mean pack's cost and patches; differences are counted in parts of it
COST_WEIGHT = 20  # of a relative difference in cost, squared; one in patches counts once
ROUND_PIECES = 40  # a round of exchanges for every so many pieces ...
MAX_ROUNDS = 200  # ... and no more than this
NEIGHBOURS = 16  # pieces of neighbouring sizes among which a round looks for pairs
ALIKE = 0.005  # packs whose costs differ by no more than this part are sorted by their patches


def exchange(
    packs: np.ndarray,
    *,
    sizes: np.ndarray,
    costs: np.ndarray,
    patches: np.ndarray,
    count: int,
    capacity: int,
    heavy: int,
    random: np.random.Generator,
) -> np.ndarray:
    """int64 [pieces]: the pack of each piece after exchanges that even out the packs.

    packs: the pack of each piece so far, of `count` packs that hold `capacity` in sizes. costs, patches: of each piece.
    The first `heavy` packs cost what they do, and are evened out in patches alone.

    In every round each pack offers one piece. Offers are sorted by size and looked at NEIGHBOURS at a time: there, the
    pack that has most is paired with the one that has least, the second most with the second least and so on. A pair
    exchanges pieces where both have the room and the sum of squared differences from the mean falls.
    """
    by_pack = np.argsort(packs, kind="stable")  # a pack's pieces lie next to each other, and keep their places
    held = np.bincount(packs, minlength=count)
    offering = np.flatnonzero(held)
    first, held = (np.cumsum(held) - held)[offering], held[offering]
    offers = len(offering) // NEIGHBOURS * NEIGHBOURS

    pack_of = packs[by_pack]
    piece = np.stack([by_pack, sizes[by_pack], _relative(costs[by_pack], count), _relative(patches[by_pack], count)])
    filled, cost, patch = (totals(pack_of, column, count) for column in piece[1:])
    room = capacity - filled
    cost -= cost[heavy:].sum() // max(count - heavy, 1)
    cost_weight = np.where(np.arange(count) < heavy, 0, COST_WEIGHT)

    for number in range(min(MAX_ROUNDS, len(packs) // ROUND_PIECES)):
        offer = first + (random.random(len(offering)) * held).astype(np.int64)
        skipped = int(random.integers(len(offering) - offers + 1))
        near = _order(piece[1, offer])[skipped : skipped + offers]
        excess = patch if number % 2 else cost * cost_weight
        near = near[_order(excess[offering[near]].reshape(-1, NEIGHBOURS))].reshape(-1, NEIGHBOURS)
        least, most = near[:, : NEIGHBOURS // 2].ravel(), near[:, : NEIGHBOURS // 2 - 1 : -1].ravel()
        ours, theirs, giver, taker = offer[most], offer[least], offering[most], offering[least]

        _, size, spent, seen = piece[:, ours] - piece[:, theirs]  # what the giver is rid of
        gain = seen * (patch[giver] - patch[taker] - seen)
        gain_of_giver = cost_weight[giver] * (2 * cost[giver] - spent)
        gain += spent * (gain_of_giver - cost_weight[taker] * (2 * cost[taker] + spent)) // 2
        good = np.flatnonzero((gain > 0) & (size <= room[taker]) & (-size <= room[giver]))
        ours, theirs, giver, taker = ours[good], theirs[good], giver[good], taker[good]
        for total, change in ((room, -size[good]), (cost, spent[good]), (patch, seen[good])):
            total[giver] -= change
            total[taker] += change
        piece[:, ours], piece[:, theirs] = piece[:, theirs], piece[:, ours]

    result = np.empty_like(packs)
    result[piece[0]] = pack_of
    return result


def deal(costs: np.ndarray, patches: np.ndarray, *, steps: int, random: np.random.Generator) -> np.ndarray:
    """int64 [steps, packs of a step]: which packs make up each step, in its order.

    Every step gets its share of costly and cheap packs: of each `steps` packs of neighbouring cost one, drawn. Within a
    step, packs stand in the order of cost; those that cost alike in the order of patches, rising and falling in turn.
    So the packs of a micro-step, which are neighbours at any data-parallel size, are alike in both.
    """
    by_cost = np.argsort(-costs, kind="stable").reshape(-1, steps)
    dealt = random.permuted(by_cost, axis=1).T
    return np.stack([_in_order(step, costs[step], patches[step]) for step in dealt])


def _in_order(packs: np.ndarray, costs: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """`packs` with falling costs -> in the order of a step."""
    ordered, begin, rising = [], 0, False
    while begin < len(packs):
        end = int(np.searchsorted(-costs, -costs[begin] * (1 - ALIKE), side="right"))
        block = np.argsort(patches[begin:end], kind="stable")
        ordered.append(packs[begin:end][block if rising else block[::-1]])
        begin, rising = end, not rising
    return np.concatenate(ordered)


def totals(packs: np.ndarray, amounts: np.ndarray, count: int) -> np.ndarray:
    """int64 [packs]: what the pieces of each pack amount to. packs: the pack of each piece."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, packs, amounts)
    return sums


def _relative(amounts: np.ndarray, count: int) -> np.ndarray:
    """Amounts of pieces in parts of the mean of `count` packs, UNIT."""
    mean = int(amounts.sum()) // count
    return amounts * UNIT // max(mean, 1)


def _order(keys: np.ndarray) -> np.ndarray:
    """Places of the keys in rising order, the first of equals first; of a matrix those of every row by itself. Sorts
    keys made unique, which is much faster than a stable argsort."""
    places = np.arange(keys.size).reshape(keys.shape)
    return (np.sort(keys * keys.size + places, axis=-1) % keys.size).ravel()
