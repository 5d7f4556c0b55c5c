"""Balancing: exchange pieces between packs, then order the packs so that neighbours need about the same work.

Two measures count: the total cost of a pack, because ranks wait for each other in every micro-step; and its vision
patches, because the vision towers run before the decoder. All figures are integers, so every machine computes the same
result.
"""

from __future__ import annotations

import numpy as np

UNIT = 1 << 16  # the mean cost and the mean patches of a pack, in the units of this module
COST_WEIGHT = 20  # weight of a squared relative difference in cost; a difference in patches has weight 1
ROUND_PIECES = 40  # one round of exchanges per this many pieces ...
MAX_ROUNDS = 200  # ... up to this many rounds
NEIGHBOURS = 16  # pieces of similar size among which a round looks for pairs
SIMILAR_COST = 0.005  # packs whose costs differ by at most this share are ordered by patches


def exchange_pieces(
    packs: np.ndarray,
    *,
    sizes: np.ndarray,
    costs: np.ndarray,
    patches: np.ndarray,
    count: int,
    capacity: int,
    heavy: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Exchange pieces between packs so that the packs become more equal.

    In every round each pack offers one piece, and packs are paired (`_pairs`). A pair exchanges its pieces if both have
    the space and the sum of squared differences from the mean falls.

    Args:
        packs: int64 [pieces], the pack of each piece; `sizes`, `costs` and `patches` are int64 [pieces] as well.
        sizes: In the unit of `capacity`.
        costs: Of any unit.
        patches: Of its images.
        count: Number of packs.
        capacity: Size of a pack.
        heavy: The first `heavy` packs are balanced by patches only; their costs cannot be balanced.
        rng: Chooses the offers.

    Returns:
        int64 [pieces], the new pack of each piece.
    """
    by_pack = np.argsort(packs, kind="stable")  # pieces of a pack are neighbours; this stays so
    held = np.bincount(packs, minlength=count)
    offering = np.flatnonzero(held)
    first, held = (np.cumsum(held) - held)[offering], held[offering]

    pack_of = packs[by_pack]
    piece = np.stack([by_pack, sizes[by_pack], _relative(costs[by_pack], count), _relative(patches[by_pack], count)])
    filled, cost, patch = (sum_per_pack(pack_of, column, count) for column in piece[1:])
    space = capacity - filled
    cost -= cost[heavy:].sum() // max(count - heavy, 1)
    cost_weight = np.where(np.arange(count) < heavy, 0, COST_WEIGHT)

    for number in range(min(MAX_ROUNDS, len(packs) // ROUND_PIECES)):
        offer = first + (rng.random(len(offering)) * held).astype(np.int64)
        excess = patch if number % 2 else cost * cost_weight
        a, b = _pairs(piece[1, offer], excess[offering], rng)
        piece_a, piece_b, pack_a, pack_b = offer[a], offer[b], offering[a], offering[b]

        _, size, spent, seen = piece[:, piece_a] - piece[:, piece_b]  # what pack a loses and pack b gains
        gain = seen * (patch[pack_a] - patch[pack_b] - seen)
        gain += _cost_gain(spent, cost[pack_a], cost[pack_b], cost_weight[pack_a], cost_weight[pack_b])
        good = np.flatnonzero((gain > 0) & (size <= space[pack_b]) & (-size <= space[pack_a]))
        piece_a, piece_b, pack_a, pack_b = piece_a[good], piece_b[good], pack_a[good], pack_b[good]
        for total, change in ((space, -size[good]), (cost, spent[good]), (patch, seen[good])):
            total[pack_a] -= change
            total[pack_b] += change
        piece[:, piece_a], piece[:, piece_b] = piece[:, piece_b], piece[:, piece_a]

    result = np.empty_like(packs)
    result[piece[0]] = pack_of
    return result


def _pairs(sizes: np.ndarray, excess: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pair packs whose offered pieces have similar sizes.

    Offers are sorted by size and processed NEIGHBOURS at a time: within these, the pack with the most excess is paired
    with the pack with the least, the second most with the second least and so on.

    Returns:
        Indices into `sizes`: of the packs with more, and of their partners.
    """
    offers = len(sizes) // NEIGHBOURS * NEIGHBOURS
    skipped = int(rng.integers(len(sizes) - offers + 1))
    similar = _argsort(sizes)[skipped : skipped + offers]
    rising = similar[_argsort(excess[similar].reshape(-1, NEIGHBOURS))].reshape(-1, NEIGHBOURS)
    most, least = rising[:, : NEIGHBOURS // 2 - 1 : -1], rising[:, : NEIGHBOURS // 2]
    return most.ravel(), least.ravel()


def _cost_gain(
    spent: np.ndarray, cost_a: np.ndarray, cost_b: np.ndarray, weight_a: np.ndarray, weight_b: np.ndarray
) -> np.ndarray:
    """Return how much half of the weighted sum of squared costs falls when pack a loses `spent` and pack b gains it."""
    return spent * (weight_a * (2 * cost_a - spent) - weight_b * (2 * cost_b + spent)) // 2


def arrange_steps(costs: np.ndarray, patches: np.ndarray, *, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Distribute the packs of a window over its steps, and order them within each step.

    Every step gets the same mix of costly and cheap packs: of each `steps` packs of neighbouring cost, one at random.
    Within a step, packs are in order of cost; packs of similar cost are in order of patches, alternately rising and
    falling. So the packs of a micro-step, which are neighbours at any data-parallel size, are similar in both.

    Args:
        costs: int64 [packs].
        patches: int64 [packs].
        steps: Number of steps; divides the number of packs.
        rng: Chooses the step of each pack.

    Returns:
        int64 [steps, packs per step], the packs of each step in order.
    """
    by_cost = np.argsort(-costs, kind="stable").reshape(-1, steps)
    shuffled = rng.permuted(by_cost, axis=1).T
    return np.stack([_in_order(step, costs[step], patches[step]) for step in shuffled])


def _in_order(packs: np.ndarray, costs: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Return `packs`, which have falling costs, in the order of a step."""
    ordered, begin, rising = [], 0, False
    while begin < len(packs):
        end = int(np.searchsorted(-costs, -costs[begin] * (1 - SIMILAR_COST), side="right"))
        block = np.argsort(patches[begin:end], kind="stable")
        ordered.append(packs[begin:end][block if rising else block[::-1]])
        begin, rising = end, not rising
    return np.concatenate(ordered)


def sum_per_pack(packs: np.ndarray, amounts: np.ndarray, count: int) -> np.ndarray:
    """Return int64 [count], the sum of `amounts` over the pieces of each pack. packs: the pack of each piece."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, packs, amounts)
    return sums


def _relative(amounts: np.ndarray, count: int) -> np.ndarray:
    """Convert amounts of pieces to units in which the mean of `count` packs is UNIT."""
    mean = int(amounts.sum()) // count
    return amounts * UNIT // max(mean, 1)


def _argsort(keys: np.ndarray) -> np.ndarray:
    """Return the indices that sort the keys, stable; of a matrix, those of every row, flattened.

    Sorts keys that were made unique, which is much faster than a stable argsort. Row indices count from the start of
    the matrix.
    """
    indices = np.arange(keys.size).reshape(keys.shape)
    return (np.sort(keys * keys.size + indices, axis=-1) % keys.size).ravel()
