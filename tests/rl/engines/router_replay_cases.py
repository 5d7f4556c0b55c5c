"""Router replay of what the embedded engine has chosen: what the processes of test_embedded.py run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from model.routed_experts import NOT_ROUTED
from rl.engines.embedded import EmbeddedEngine
from rl.log_probs import log_probs_of, mismatch, with_old_log_probs
from rl.policy_batch import LearnedRollout, PolicyBatch, make_policy_batch
from tests.model.layout_cases import SEQ_LENGTH, of_this_rank
from tests.reference import small_config
from tests.rl.engines.embedded_cases import SAMPLING, SPECIAL, requests
from tests.rl.policy_cases import TIS, make_trainer


@dataclass(frozen=True)
class Found:
    """What replaying an engine's choice gave."""

    drawn: int  # tokens
    rollouts: int
    unrouted: int  # useful tokens for which no experts were chosen
    unlike: float  # largest difference of log-probabilities with and without replay, with the engine's weights
    unlike_after_update: float  # and with those after an update
    mismatch: float  # largest, between engine and policy
    first_deviation: float  # of a ratio from 1, in the first update


def engines_choice(variant: str, folder: str, layout: str) -> Found:
    """Let the embedded engine draw, and replay its choice with its weights, and with others."""
    trainer, config = make_trainer(variant, folder, layout), small_config(variant)
    engine = EmbeddedEngine(config, SPECIAL, torch.float32)
    engine.publish(trainer, version=0)
    asked = requests(config)
    rollouts = engine.generate(asked, replace(SAMPLING, routed_experts=True))
    engine.close()
    for first, *others in (rollouts[place : place + 3] for place in range(0, len(rollouts), 3)):
        assert all(other.experts.prompt is first.experts.prompt for other in others)  # type: ignore[union-attr]
    prompts = [request.prompt.sample for request in asked for _ in request.seeds]
    learned = [
        LearnedRollout(prompt, rollout, (-1.0) ** place)
        for place, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
    ]
    make = partial(
        make_policy_batch, seq_length=SEQ_LENGTH, segment_multiple=8, image_id=config.image_token_id, pad_id=0
    )
    packs = [make(learned[place : place + 2]) for place in range(0, len(learned) // 4 * 4, 2)]
    both = log_probs_of(trainer, packs), log_probs_of(trainer, [without_experts(pack) for pack in packs])
    own = of_this_rank([with_old_log_probs(pack, old, TIS) for pack, old in zip(packs, both[0], strict=True)])
    metrics = trainer.run(1, own).metrics
    moved = log_probs_of(trainer, packs), log_probs_of(trainer, [without_experts(pack) for pack in packs])
    return Found(
        drawn=sum(int((pack.weights > 0).sum()) for pack in packs),
        rollouts=sum(pack.num_samples for pack in packs),
        unrouted=sum(unrouted(pack) for pack in packs),
        unlike=largest(*both, packs),
        unlike_after_update=largest(*moved, packs),
        mismatch=mismatch(own, TIS).largest,
        first_deviation=metrics["policy/max_ratio_deviation"],
    )


def without_experts(pack: PolicyBatch) -> PolicyBatch:
    return replace(pack, routed_experts=None)


def largest(one: list[Tensor], other: list[Tensor], packs: list[PolicyBatch]) -> float:
    """Return the largest difference of log-probabilities of drawn tokens."""
    return max(float((a - b)[pack.weights > 0].abs().max()) for a, b, pack in zip(one, other, packs, strict=True))


def unrouted(pack: PolicyBatch) -> int:
    """Return how many useful tokens have no experts."""
    assert pack.routed_experts is not None
    is_none = (pack.routed_experts == NOT_ROUTED).flatten(1)
    assert torch.equal(is_none.any(1), is_none.all(1))
    useful = torch.zeros(SEQ_LENGTH, dtype=torch.bool)
    for begin, length in zip(pack.cu_seqlens.tolist(), pack.segment_lengths.tolist(), strict=False):
        useful[begin : begin + length] = True
    assert is_none[~useful].all()
    return int(is_none.all(1)[useful].sum())
