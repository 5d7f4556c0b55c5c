"""What an update is expected to take, before a rollout is drawn: lengths are assumed, the packs are the run's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.config import GlmvConfig
from rl.config import RlConfig
from rl.packs import Work, plan_packs
from rl.setup import longest_response
from training.pack_cost import pack_cost

# Of a prompt, or of a rollout with its prompt: tokens, and the patches of each image and frame pair.
Sizes = tuple[int, Sequence[int]]


def expected_rollouts(config: RlConfig, prompts: Sequence[Sizes]) -> list[Sizes]:
    """Return the rollouts of an update. The responses of a group are spread evenly up to the longest.

    Args:
        config: The run.
        prompts: Such as the run's; they are taken in turn.
    """
    group, longest = config.rl.group, longest_response(config)
    responses = [longest * (2 * number + 1) // (2 * group) for number in range(group)]
    of_update = -(-config.rl.prompts // config.rl.updates)
    chosen = [prompts[number % len(prompts)] for number in range(of_update)]
    return [(length + response, patches) for length, patches in chosen for response in responses]


def expected_packs(config: RlConfig, model: GlmvConfig, rollouts: Sequence[Sizes]) -> list[list[Sizes]]:
    """Return the packs of an update's rollouts on a single data-parallel rank, as the run would make them."""
    patches = [np.array(of_prompt, np.int64) for _, of_prompt in rollouts]
    work = Work(
        lengths=np.array([length for length, _ in rollouts], np.int64),
        patches=np.array([each.sum() for each in patches], np.int64),
        patches_squared=np.array([(each**2).sum() for each in patches], np.int64),
    )
    [packs] = plan_packs(
        work,
        cost=pack_cost(model),
        seq_length=config.train.seq_length,
        segment_multiple=config.data.segment_multiple,
        ranks=1,
        multiple=1,
        seed=(0,),
    )
    return [[rollouts[number] for number in pack] for pack in packs if pack]
