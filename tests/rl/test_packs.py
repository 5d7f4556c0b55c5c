"""Packs of rollouts: as few as hold them, even over ranks, and the gradient of one big batch."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.plan.pack_cost import PackCost
from rl.packs import Work, plan_packs

pytestmark = pytest.mark.fast

COST = PackCost(token=20_000, token_squared=4, patch=5_000, patch_squared=2)
SEQ_LENGTH, MULTIPLE = 32768, 8


def measured_rollouts(count: int, seed: int) -> Work:
    """Lengths as groups of 8 reasoning rollouts have them: log-normal responses with a limit, prompts with images."""
    rng = np.random.default_rng(seed)
    prompts = count // 8
    patches = np.repeat(rng.integers(1, 40, prompts) * 256, 8)
    prompt = np.repeat(rng.integers(30, 400, prompts), 8) + patches // 4
    response = np.minimum(rng.lognormal(7.2, 0.8, count).astype(np.int64) + 1, 10_240)
    return Work(prompt + response, patches, patches**2)


def costs_of(work: Work) -> np.ndarray:
    return COST.of(work.lengths, work.patches, work.patches_squared)


@pytest.mark.parametrize(("ranks", "rollouts"), [(64, 4096), (8, 1024), (3, 200), (1, 8)])
def test_packs_hold_every_rollout_once_and_are_few(ranks: int, rollouts: int) -> None:
    work = measured_rollouts(rollouts, seed=ranks)
    packs = plan_packs(
        work, cost=COST, seq_length=SEQ_LENGTH, segment_multiple=MULTIPLE, ranks=ranks, multiple=1, seed=(1, 2)
    )
    members = [pack for of_rank in packs for pack in of_rank]
    assert sorted(number for pack in members for number in pack) == list(range(rollouts))
    padded = -(-work.lengths // MULTIPLE) * MULTIPLE
    assert all(padded[pack].sum() <= SEQ_LENGTH for pack in members)
    assert len({len(of_rank) for of_rank in packs}) == 1
    bound = -(-int(padded.sum()) // (SEQ_LENGTH * ranks))
    assert len(packs[0]) == bound


def test_64_ranks_have_even_work() -> None:
    work = measured_rollouts(128 * 64, seed=0)
    packs = plan_packs(
        work, cost=COST, seq_length=SEQ_LENGTH, segment_multiple=MULTIPLE, ranks=64, multiple=1, seed=(3,)
    )
    costs = costs_of(work)
    of_rank = np.array([sum(costs[pack].sum() for pack in packs_of_rank) for packs_of_rank in packs])
    assert of_rank.max() / of_rank.mean() <= 1.05


@pytest.mark.parametrize("multiple", [1, 4])
def test_packs_are_a_multiple_and_may_be_empty(multiple: int) -> None:
    work = Work(np.array([100, 5000]), np.zeros(2, np.int64), np.zeros(2, np.int64))
    packs = plan_packs(
        work, cost=COST, seq_length=SEQ_LENGTH, segment_multiple=MULTIPLE, ranks=3, multiple=multiple, seed=(0,)
    )
    assert [len(of_rank) for of_rank in packs] == [multiple] * 3
    assert sorted(number for of_rank in packs for pack in of_rank for number in pack) == [0, 1]
    nothing = Work(*[np.zeros(0, np.int64)] * 3)
    empty = plan_packs(
        nothing, cost=COST, seq_length=SEQ_LENGTH, segment_multiple=MULTIPLE, ranks=2, multiple=multiple, seed=(0,)
    )
    assert empty == [[[]] * multiple] * 2


def test_same_rollouts_give_the_same_packs() -> None:
    work = measured_rollouts(512, seed=4)
    plans = [
        plan_packs(work, cost=COST, seq_length=SEQ_LENGTH, segment_multiple=MULTIPLE, ranks=4, multiple=1, seed=(9, n))
        for n in (0, 0)
    ]
    assert plans[0] == plans[1]
