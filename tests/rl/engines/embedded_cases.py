"""Prompts, and functions that the processes of tests/rl/engines/test_embedded.py run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.encoding.batch import EncodedSample, collate
from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.errors import Interrupted
from model.config import GlmvConfig
from rl.engines.embedded import EmbeddedEngine
from rl.engines.forcing import ResponseTokens
from rl.rollouts import Request, Rollout, RolloutPrompt, Sampling, seed_of
from tests.model import layout_cases
from tests.model.layout_cases import of_this_rank, packs_of_step
from tests.reference import Element, Image, TestSample, Text, Video, make_sample, small_config
from training.step import forward

# Random weights draw all tokens about equally often: 60 of 2,048 end a turn, and 20 are media tokens, <|image|> (34)
# among them.
SPECIAL = ResponseTokens(
    ends=tuple(range(100, 160)), media=(10, 11, 12, 13, 34, 35, *range(40, 54)), think_end=22, forced=(22, 60, 61)
)
SAMPLING = Sampling(temperature=1.0, max_thinking_tokens=16, max_answer_tokens=12, force_answer=True)
PROMPTS: list[list[Element]] = [
    [Text(12)],
    [Text(5), Image(4, 6), Text(9)],
    [Text(3), Video(2, 4, 4), Text(7)],
    [Image(8, 4), Text(3), Image(4, 4), Text(20)],
    [Text(40)],
    [Text(1), Image(2, 2), Text(30)],
]


def samples(config: GlmvConfig, prompts: Sequence[list[Element]] = PROMPTS) -> list[TestSample]:
    return [make_sample(config, elements, seed=number) for number, elements in enumerate(prompts)]


def requests(config: GlmvConfig, group: int = 3, prompts: Sequence[list[Element]] = PROMPTS) -> list[Request]:
    """Return requests, of which every second is to think first."""
    made = []
    for number, sample in enumerate(samples(config, prompts)):
        prompt = RolloutPrompt(f"a.tar/{number}", sample.encoded, (), (), thinks=number % 2 == 0)
        made.append(Request(prompt, tuple(seed_of(1, 1, prompt.id, place) for place in range(group))))
    return made


def roll_out(variant: str, folder: str, layout: str, trained: bool = False) -> list[Rollout]:
    """Return what every process gets in a layout: of the weights in `folder`, or of those after a step of training."""
    trainer = layout_cases.make_trainer(variant, folder, layout, steps=1)
    config = small_config(variant)
    engine = EmbeddedEngine(config, SPECIAL, torch.float32)
    if trained:
        trainer.run(1, of_this_rank(packs_of_step(variant, 1)))
    engine.publish(trainer, version=int(trained))
    rollouts = engine.generate(requests(config), SAMPLING)
    engine.close()
    return rollouts


def stopped_and_drawn_again(variant: str, folder: str, rank: int, after: int) -> tuple[int, list[Rollout]]:
    """Draw on two leads, of which one is asked to stop after some tokens; then draw all.

    Returns:
        How often the module here computed logits until the drawing ended, and what this process gets the second time.
    """
    trainer = layout_cases.make_trainer(variant, folder, "DP2", steps=1)
    tokens: list[None] = []
    computed: list[None] = []

    def on_wait() -> None:
        tokens.append(None)
        if dist.get_rank() == rank and len(tokens) == after:
            raise Interrupted("asked to stop")

    engine = EmbeddedEngine(small_config(variant), SPECIAL, torch.float32, on_wait=on_wait)
    engine.publish(trainer, version=0)
    engine.module.lm_head.register_forward_hook(lambda *_: computed.append(None))
    with pytest.raises(Interrupted):
        engine.generate(requests(engine.config), SAMPLING)
    passes = len(computed)
    return passes, engine.generate(requests(engine.config), SAMPLING)


def policy_log_probs(model: Any, prompt: EncodedSample, rollout: Rollout) -> Tensor:
    """Return the log-probabilities of a rollout's tokens by the model that is trained, from a pack of both."""
    config: GlmvConfig = model.glmv_config
    ids = np.concatenate([prompt.input_ids, rollout.tokens])
    is_image = np.append((ids == config.image_token_id)[:-1], False)  # a media token at the end has no image
    sample = replace(
        prompt,
        input_ids=ids,
        loss=np.arange(len(ids)) >= len(prompt),
        position_ids=rope_positions(is_image, prompt.grids),
    )
    batch = collate([sample], seq_length=len(ids) + 8 - len(ids) % 8, segment_multiple=8, pad_id=0)
    batch.input_ids[len(ids) - 1] = 0  # it is a label only
    with torch.no_grad():
        return -forward(model, batch)[len(prompt) - 1 : len(ids) - 1]
