"""Which rollouts share a pack, and which data-parallel rank has it: the planner's own packer, on this update's lengths.

Lengths are known only after the rollouts. So every update has a plan of its own: into as few packs as hold it, all of
about the same cost. They are dealt to the ranks so that the ranks of each micro-step, and their sums, are even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.balance import arrange_steps, exchange_pieces, sum_per_pack
from data_pipeline.plan.pack import SPREAD_SHARE, pack
from data_pipeline.plan.pack_cost import PackCost

COST_UNIT = 1 << 24  # mean cost of a rollout; integers, so that every machine makes the same plan


@dataclass(frozen=True)
class Work:
    """What each rollout of an update takes; int64 [rollouts] each."""

    lengths: np.ndarray  # tokens, of prompt and response
    patches: np.ndarray  # of the prompt's images and frame pairs
    patches_squared: np.ndarray  # the sum of their squares


def plan_packs(
    work: Work,
    *,
    cost: PackCost,
    seq_length: int,
    segment_multiple: int,
    ranks: int,
    multiple: int,
    seed: Sequence[int],
) -> list[list[list[int]]]:
    """Return, for each data-parallel rank, the rollouts of each of its packs. Some packs may be empty.

    Args:
        work: Lengths of at most seq_length.
        cost: By which packs are balanced.
        seq_length: Tokens per pack.
        segment_multiple: Rollouts are padded to a multiple of this many tokens.
        ranks: Data-parallel ranks.
        multiple: Of which the packs of a rank are a multiple (the pipeline schedule).
        seed: Decides exchanges that are equally good.
    """
    if not len(work.lengths):
        return [[[] for _ in range(multiple)] for _ in range(ranks)]
    rng = np.random.Generator(np.random.PCG64(list(seed)))
    sizes, capacity = -(-work.lengths // segment_multiple), seq_length // segment_multiple
    costs = cost.of(work.lengths, work.patches, work.patches_squared)
    costs = (costs * (COST_UNIT / costs.mean())).astype(np.int64)
    chosen, count = _fewest_packs(sizes, capacity, ranks * multiple)
    chosen = exchange_pieces(
        chosen, sizes=sizes, costs=costs, patches=work.patches, count=count, capacity=capacity, heavy=0, rng=rng
    )
    pack_costs, pack_patches = (sum_per_pack(chosen, amounts, count) for amounts in (costs, work.patches))
    order = arrange_steps(pack_costs, pack_patches, steps=1, rng=rng)[0]
    members = [np.flatnonzero(chosen == number).tolist() for number in range(count)]
    return [[members[number] for number in packs] for packs in _deal(order, pack_costs, ranks)]


def _fewest_packs(sizes: np.ndarray, capacity: int, multiple: int) -> tuple[np.ndarray, int]:
    """Return the pack of each rollout, and the smallest number of packs, a multiple, that holds them."""
    count = -(-int(sizes.sum()) // (capacity * multiple)) * multiple
    while True:
        for spread_share in (SPREAD_SHARE, 0.0):  # evenly full, and if that fails, as full as possible
            chosen = pack(sizes, capacity=capacity, packs=count, spread_share=spread_share)
            if (chosen >= 0).all():
                return chosen, count
        count += multiple


def _deal(order: np.ndarray, costs: np.ndarray, ranks: int) -> list[list[int]]:
    """Return the packs of each rank: of every `ranks` packs in order of cost, the rank with the least so far gets most.

    Args:
        order: int64 [packs], of falling cost.
        costs: int64 [packs].
        ranks: Divides the number of packs.
    """
    totals, dealt = np.zeros(ranks, np.int64), [list[int]() for _ in range(ranks)]
    for micro_step in order.reshape(-1, ranks):
        falling = micro_step[np.argsort(-costs[micro_step], kind="stable")]
        for rank, number in zip(np.argsort(totals, kind="stable").tolist(), falling.tolist(), strict=True):
            dealt[rank].append(number)
            totals[rank] += costs[number]
    return dealt
