"""Packs of rollouts: what lies on the labels, brute force, and a drawn media token, which is no input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.log_probs import with_old_log_probs
from rl.policy_batch import make_policy_batch
from tests.model.layout_cases import SEQ_LENGTH
from tests.reference import small_config
from tests.rl.chosen_experts import random_experts
from tests.rl.policy_cases import PACKS, PROMPTS, learned_rollouts, packs_of, with_experts

pytestmark = pytest.mark.fast

CONFIG = small_config("glm4v")


def test_every_drawn_token_is_a_label_with_the_weight_of_its_rollout() -> None:
    rollouts = learned_rollouts("glm4v", [np.linspace(-3, -1, count) for _, count in PROMPTS])
    for members, batch in zip(PACKS, packs_of("glm4v", rollouts), strict=True):
        seen = torch.zeros(SEQ_LENGTH, dtype=torch.bool)
        begin = 0
        for number in members:
            learned = rollouts[number]
            count = int((~learned.rollout.inserted).sum())
            for place, token in enumerate(learned.rollout.tokens):
                label = begin + len(learned.prompt) + place - 1
                if learned.rollout.inserted[place]:
                    continue
                seen[label] = True
                assert batch.labels[label] == token
                assert batch.loss_mask[label] == 1
                assert batch.weights[label] == pytest.approx(1 / count)
                assert batch.advantages[label] == pytest.approx(learned.advantage)
                assert batch.engine_log_probs[label] == pytest.approx(learned.rollout.log_probs[place])
            begin += -(-len(learned) // 8) * 8
        for values in (batch.weights, batch.advantages, batch.engine_log_probs, batch.importance, batch.loss_mask):
            assert not values[~seen].any()
        assert float(batch.weights.sum()) == pytest.approx(len(members), rel=1e-6)


def test_drawn_media_token_is_a_label_and_no_input() -> None:
    learned = learned_rollouts("glm4v")[0]
    tokens = learned.rollout.tokens.copy()
    tokens[-1] = CONFIG.image_token_id
    learned = replace(learned, rollout=replace(learned.rollout, tokens=tokens, finish="media"))
    batch = make_policy_batch(
        [learned], seq_length=SEQ_LENGTH, segment_multiple=8, image_id=CONFIG.image_token_id, pad_id=0
    )
    last = len(learned) - 1
    assert batch.labels[last - 1] == CONFIG.image_token_id
    assert batch.loss_mask[last - 1] == 1
    assert batch.input_ids[last] == 0
    assert int((batch.input_ids == CONFIG.image_token_id).sum()) == int(batch.grid_thw.prod(1).sum()) // 4


def test_experts_lie_on_the_tokens_that_the_engine_read() -> None:
    rng, config = np.random.default_rng(2), small_config("glm4v_moe")
    rollouts = learned_rollouts("glm4v_moe")
    experts = [random_experts(len(learned), config.decoder, rng) for learned in rollouts]
    packs = packs_of("glm4v_moe", with_experts(rollouts, experts))
    layers = config.decoder.num_hidden_layers - config.decoder.first_k_dense_replace
    for members, batch in zip(PACKS, packs, strict=True):
        assert batch.routed_experts is not None
        expected = torch.full((SEQ_LENGTH, layers, config.decoder.num_experts_per_tok), 255, dtype=torch.uint8)
        for number, begin in zip(members, batch.cu_seqlens.tolist(), strict=False):
            for place, chosen in enumerate(experts[number]):
                expected[begin + place] = torch.from_numpy(chosen)
        assert torch.equal(batch.routed_experts, expected)
    assert all(batch.routed_experts is None for batch in packs_of("glm4v_moe", rollouts))


def test_importance_is_the_ratio_of_both_probabilities_up_to_a_limit() -> None:
    batch = packs_of("glm4v", learned_rollouts("glm4v", [np.full(count, -1.0) for _, count in PROMPTS]))[0]
    is_drawn = batch.weights > 0
    old = torch.linspace(-2, 1, SEQ_LENGTH)
    corrected = with_old_log_probs(batch, old, limit=2.0)
    expected = torch.minimum((old - batch.engine_log_probs).exp(), torch.tensor(2.0)) * is_drawn
    torch.testing.assert_close(corrected.importance, expected)
    assert (corrected.importance == 2).any()
    assert torch.equal(with_old_log_probs(batch, old, limit=0).importance, is_drawn.float())
