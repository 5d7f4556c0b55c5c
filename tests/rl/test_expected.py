"""What an update is expected to take."""

from __future__ import annotations

from collections import Counter

import pytest

from model.config import GlmvConfig
from rl.config import RlConfig
from rl.expected import expected_packs, expected_rollouts
from rl.setup import longest_response

pytestmark = pytest.mark.fast


def config() -> RlConfig:
    made = RlConfig()
    made.rl.prompts, made.rl.group, made.rl.updates = 10, 4, 3
    made.rollout.max_thinking_tokens, made.rollout.max_answer_tokens = 600, 192
    made.train.seq_length, made.data.segment_multiple = 4096, 8
    return made


def test_responses_of_a_group_are_spread_up_to_the_longest() -> None:
    """Four prompts at most in each of three updates of ten; 800 tokens with those that end a thought."""
    assert longest_response(config()) == 800
    rollouts = expected_rollouts(config(), [(100, [64]), (30, [])])
    assert [length for length, _ in rollouts] == 2 * [200, 400, 600, 800, 130, 330, 530, 730]
    assert [patches for _, patches in rollouts] == 2 * [*4 * [[64]], *4 * [[]]]


def test_packs_hold_every_rollout_once_and_are_few() -> None:
    rollouts = expected_rollouts(config(), [(100, [64]), (30, []), (1500, [4096, 1024])])
    packs = expected_packs(config(), GlmvConfig.from_preset("tiny_dense"), rollouts)

    def counted(members: list) -> Counter:
        return Counter((length, tuple(patches)) for length, patches in members)

    assert counted([member for pack in packs for member in pack]) == counted(rollouts)
    padded = [sum(-(-length // 8) * 8 for length, _ in pack) for pack in packs]
    assert max(padded) <= 4096
    assert len(packs) <= -(-sum(padded) // 4096) + 1
