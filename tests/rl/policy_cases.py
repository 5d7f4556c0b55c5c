"""Rollouts to learn from, the policy loss over transformers, and what the processes of the tests run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

import training.step
from data_pipeline.plan.pack_cost import PackCost
from model.glmv import build_model_chunks
from model.process_groups import initialize_model_parallel
from model.recompute import RecomputeConfig
from model.weights.load import SafetensorsFolder, load_weights
from rl.iteration import work_of
from rl.log_probs import log_probs_of, mismatch, with_old_log_probs
from rl.objective import PolicyLoss
from rl.packs import plan_packs
from rl.policy_batch import LearnedRollout, PolicyBatch, make_policy_batch
from rl.rollouts import Rollout, RoutedExperts
from tests.model.layout_cases import (
    OPTIMIZER,
    SEQ_LENGTH,
    canonical_parameters,
    differences_of,
    layout_of,
    of_this_rank,
)
from tests.reference import Element, Image, TestSample, Text, Video, make_sample, small_config, transformers_logits
from tests.rl.chosen_experts import told_if_any
from training.step import TrainStep

CLIP = PolicyLoss(clip_low=0.2, clip_high=0.28)
TIS = 1.5
# The elements of each prompt, and the length of its response; the rollouts of each pack.
PROMPTS: list[tuple[list[Element], int]] = [
    ([Text(3), Image(4, 6), Text(9)], 30),
    ([Text(5), Image(4, 6), Text(9)], 7),
    ([Text(20)], 25),
    ([Text(4), Video(2, 4, 4), Text(9)], 12),
    ([Image(8, 4), Text(20)], 1),
    ([Text(9), Image(2, 2), Text(5), Image(4, 4), Text(11)], 40),
    ([Text(40)], 60),
    ([Text(6)], 17),
]
Packs: TypeAlias = Sequence[Sequence[int]]
PACKS: Packs = ([0, 1, 2], [3, 4], [5], [6, 7])


def samples_of(variant: str) -> list[TestSample]:
    """Return prompts with their responses."""
    config = small_config(variant)
    return [make_sample(config, [*elements, Text(n)], seed=70 + i) for i, (elements, n) in enumerate(PROMPTS)]


def learned_rollouts(variant: str, engine_log_probs: Sequence[np.ndarray] | None = None) -> list[LearnedRollout]:
    """Return the rollouts, with advantages of both signs; some tokens were inserted."""
    rng = np.random.default_rng(5)
    found = []
    for number, (sample, (_, drawn)) in enumerate(zip(samples_of(variant), PROMPTS, strict=True)):
        prompt = len(sample.encoded) - drawn
        inserted = np.zeros(drawn, bool)
        inserted[drawn // 2 : drawn // 2 + 3] = drawn > 20
        log_probs = engine_log_probs[number] if engine_log_probs is not None else np.zeros(drawn, np.float32)
        rollout = Rollout(
            prompt_id=sample.encoded.sample_id,
            number=number,
            seed=number,
            tokens=sample.encoded.input_ids[prompt:],
            log_probs=np.where(inserted, np.nan, log_probs).astype(np.float32),
            inserted=inserted,
            finish="ended",
            forced=bool(inserted.any()),
            version=0,
        )
        found.append(LearnedRollout(beginning(sample, prompt), rollout, float(rng.normal())))
    return found


def with_experts(rollouts: Sequence[LearnedRollout], experts: Sequence[np.ndarray]) -> list[LearnedRollout]:
    """Return rollouts whose engine has chosen these experts for their tokens."""
    return [
        replace(
            learned,
            rollout=replace(
                learned.rollout, experts=RoutedExperts(chosen[: len(learned.prompt)], chosen[len(learned.prompt) :])
            ),
        )
        for learned, chosen in zip(rollouts, experts, strict=True)
    ]


def beginning(sample: TestSample, length: int) -> Any:
    """Return the first tokens of a sample, as a prompt."""
    whole = sample.encoded
    return replace(
        whole,
        input_ids=whole.input_ids[:length],
        loss=np.zeros(length, bool),
        position_ids=whole.position_ids[:, :length],
    )


def packs_of(
    variant: str, rollouts: Sequence[LearnedRollout], packs: Packs = PACKS, seq_length: int = SEQ_LENGTH
) -> list[PolicyBatch]:
    """Return the packs of the global batch."""
    config = small_config(variant)
    make = partial(
        make_policy_batch, seq_length=seq_length, segment_multiple=8, image_id=config.image_token_id, pad_id=0
    )
    return [make([rollouts[number] for number in members]) for members in packs]


def spread(
    values: Sequence[np.ndarray],
    rollouts: Sequence[LearnedRollout],
    packs: Packs = PACKS,
    seq_length: int = SEQ_LENGTH,
) -> list[Tensor]:
    """Return values of the tokens of each response in the places of their labels, float32 [tokens] for each pack."""
    found = []
    for members in packs:
        row, begin = np.zeros(seq_length, np.float32), 0
        for number in members:
            first = begin + len(rollouts[number].prompt) - 1
            row[first : first + len(values[number])] = values[number]
            begin += -(-len(rollouts[number]) // 8) * 8
        found.append(torch.from_numpy(row))
    return found


# --- transformers, one rollout at a time ------------------------------------------------------------------------------


def response_log_probs(model: nn.Module, sample: TestSample, drawn: int, experts: np.ndarray | None = None) -> Tensor:
    """Return the log-probability of each token of a response, [drawn]; with experts that routers are told to choose."""
    with told_if_any(model, experts):
        logits = transformers_logits(model, sample)[-drawn - 1 : -1]
    tokens = torch.from_numpy(sample.encoded.input_ids[-drawn:])
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def transformers_policy_loss(
    model: nn.Module,
    variant: str,
    old: Sequence[np.ndarray],
    engine: Sequence[np.ndarray],
    experts: Sequence[np.ndarray | None] = (None,) * len(PROMPTS),
) -> tuple[Tensor, float]:
    """Return the policy loss of all rollouts, and the share of their tokens that is clipped."""
    total, clipped_tokens, tokens = torch.zeros(()), 0, 0
    rollouts = learned_rollouts(variant)
    each = zip(samples_of(variant), rollouts, old, engine, experts, strict=True)
    for sample, learned, before, by_engine, chosen in each:
        drawn = torch.from_numpy(~learned.rollout.inserted)
        now = response_log_probs(model, sample, len(learned.rollout.tokens), chosen)[drawn]
        was, drew = torch.from_numpy(before)[drawn], torch.from_numpy(by_engine)[drawn]
        ratio, advantage = (now - was).exp(), learned.advantage
        bound = 1.28 if advantage > 0 else 0.8  # the side on which a token is held back
        stopped = (ratio > bound) if advantage > 0 else (ratio < bound)
        gain = torch.where(stopped, torch.full_like(ratio, bound), ratio) * advantage
        importance = torch.minimum((was - drew).exp(), torch.tensor(TIS))
        total = total - (importance * gain).mean()
        clipped_tokens, tokens = clipped_tokens + int(stopped.sum()), tokens + len(ratio)
    return total / len(rollouts), clipped_tokens / tokens


# --- what the processes run -------------------------------------------------------------------------------------------


def make_trainer(
    variant: str, folder: str, layout: str, recompute: str = "none", seq_length: int = SEQ_LENGTH
) -> TrainStep:
    """Build a policy with the weights in `folder`."""
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_model_chunks(
        small_config(variant), parallel, pipeline_layout=stages, recompute=RecomputeConfig(recompute, "none")
    )
    load_weights(chunks, SafetensorsFolder(Path(folder)))
    return TrainStep([chunk.train() for chunk in chunks], OPTIMIZER, 3, seq_length, objective=CLIP)


def policy_gradients(variant: str, folder: str, layout: str, expected: str, recompute: str = "none") -> dict[str, Any]:
    """Compare loss and gradients with those in the file `expected`.

    It also has the old log-probabilities, and may have the experts that the engine chose.
    """
    trainer, wanted = make_trainer(variant, folder, layout, recompute), torch.load(expected, weights_only=True)
    engine = [values.numpy() for values in wanted["engine"]]
    rollouts = learned_rollouts(variant, engine)
    if wanted["experts"]:
        rollouts = with_experts(rollouts, [chosen.numpy() for chosen in wanted["experts"]])
    old = spread([values.numpy() for values in wanted["old"]], rollouts)
    packs = [
        with_old_log_probs(batch, log_probs, TIS)
        for batch, log_probs in zip(packs_of(variant, rollouts), old, strict=True)
    ]
    loss, held = measured(trainer, of_this_rank(packs))
    return {"loss": loss, "differences": differences_of(held, small_config(variant), wanted["gradients"])}


def measured(trainer: TrainStep, packs: Sequence[PolicyBatch]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss, and the whole gradients of this rank's parameters, on every data-parallel rank."""
    whole = partial(get_forward_backward_func(), force_all_reduce=True)  # give every rank whole gradients
    true_schedule = training.step.get_forward_backward_func
    training.step.get_forward_backward_func = lambda: whole
    try:
        loss, _ = trainer.measure(packs)
    finally:
        training.step.get_forward_backward_func = true_schedule
    held = {
        name: parameter.main_grad
        for chunk in trainer.model_chunks
        for name, parameter in canonical_parameters(chunk).items()
    }
    return loss, held


def repacked_gradients(variant: str, folder: str, layout: str, expected: str, seq_length: int) -> dict[str, Any]:
    """Return the gradients of the update that `expected` describes, in packs of a length that the planner makes.

    Returns:
        The packs of every data-parallel rank, the loss, and the gradients by parameter.
    """
    trainer, wanted = (
        make_trainer(variant, folder, layout, seq_length=seq_length),
        torch.load(expected, weights_only=True),
    )
    rollouts = learned_rollouts(variant, [values.numpy() for values in wanted["engine"]])
    planned = plan_packs(
        work_of(rollouts),
        cost=PackCost(token=20_000, token_squared=4, patch=5_000, patch_squared=2),
        seq_length=seq_length,
        segment_multiple=8,
        ranks=parallel_state.get_data_parallel_world_size(),
        multiple=1,
        seed=(1,),
    )
    own = planned[parallel_state.get_data_parallel_rank()]
    old = spread([values.numpy() for values in wanted["old"]], rollouts, own, seq_length)
    packs = [
        with_old_log_probs(batch, log_probs, TIS)
        for batch, log_probs in zip(packs_of(variant, rollouts, own, seq_length), old, strict=True)
    ]
    loss, gradients = measured(trainer, packs)
    return {"planned": planned, "loss": loss, "gradients": {name: each.clone() for name, each in gradients.items()}}


def replayed_log_probs(variant: str, folder: str, layout: str, expected: str) -> list[Tensor]:
    """Return the log-probabilities of drawn tokens, 0 elsewhere, with the experts in the file `expected`."""
    trainer, wanted = make_trainer(variant, folder, layout), torch.load(expected, weights_only=True)
    rollouts = with_experts(learned_rollouts(variant), [chosen.numpy() for chosen in wanted["experts"]])
    packs = packs_of(variant, rollouts)
    values = log_probs_of(trainer, packs)
    return [torch.where(pack.weights > 0, of_pack, 0.0) for pack, of_pack in zip(packs, values, strict=True)]


def first_update(variant: str, folder: str, layout: str) -> dict[str, Any]:
    """Compute the old log-probabilities as a run does, and take the first update and a second one.

    Returns:
        The log-probabilities of this rank's packs, how far the engine's were, and the metrics of both updates.
    """
    trainer = make_trainer(variant, folder, layout)
    own = of_this_rank(packs_of(variant, learned_rollouts(variant)))
    log_probs = log_probs_of(trainer, own)
    packs = [with_old_log_probs(batch, values, TIS) for batch, values in zip(own, log_probs, strict=True)]
    metrics = [trainer.run(step, packs).metrics for step in (1, 2)]
    return {
        "log_probs": [
            torch.where(batch.weights > 0, values, 0.0) for batch, values in zip(own, log_probs, strict=True)
        ],
        "mismatch": mismatch(packs, TIS),
        "metrics": metrics,
    }
