"""The embedded engine: its probabilities are the policy's, its rollouts depend on weights, prompt and seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from model.config import GlmvConfig
from model.glmv import GlmvModel
from rl.engines.embedded import EmbeddedEngine
from rl.rollouts import Request, Rollout, Sampling, seed_of
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, packs_of_step
from tests.model.test_layouts import variant_of
from tests.processes import Processes
from tests.reference import TestSample, Text, small_config, transformers_logits
from tests.rl.engines.embedded_cases import (
    PROMPTS,
    SAMPLING,
    SPECIAL,
    policy_log_probs,
    requests,
    roll_out,
    samples,
    stopped_and_drawn_again,
)
from tests.rl.engines.router_replay_cases import engines_choice
from training.step import TrainStep

LIMIT = 1e-5  # of the difference of log-probabilities


@pytest.fixture
def trainer(build: Callable[..., GlmvModel]) -> TrainStep:
    return TrainStep([build(balance_loss_coeff=0.01, expert_bias_update_rate=1e-3).train()], OPTIMIZER, 2, SEQ_LENGTH)


@pytest.fixture
def config(hf_folder: tuple[Path, nn.Module]) -> GlmvConfig:
    return small_config(variant_of(hf_folder))


@pytest.fixture
def engine(trainer: TrainStep, config: GlmvConfig) -> EmbeddedEngine:
    made = EmbeddedEngine(config, SPECIAL, torch.float32)
    made.publish(trainer, version=0)
    return made


def largest_gap(trainer: TrainStep, asked: list[Request], rollouts: list[Rollout]) -> float:
    """Return the largest difference of log-probabilities of drawn tokens between an engine and the policy."""
    model = trainer.model_chunks[0].eval()
    prompts = {request.prompt.id: request.prompt.sample for request in asked}
    gaps = [
        np.abs(policy_log_probs(model, prompts[rollout.prompt_id], rollout).numpy() - rollout.log_probs)
        for rollout in rollouts
    ]
    model.train()
    return max(gap[~rollout.inserted].max() for gap, rollout in zip(gaps, rollouts, strict=True))


def same(one: list[Rollout], other: list[Rollout], limit: float = LIMIT) -> None:
    assert len(one) == len(other)
    for found, expected in zip(one, other, strict=True):
        for name in ("prompt_id", "number", "seed", "finish", "forced", "version"):
            assert getattr(found, name) == getattr(expected, name)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.inserted, expected.inserted)
        np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=0, atol=limit)


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_policy(
    engine: EmbeddedEngine, trainer: TrainStep, config: GlmvConfig
) -> None:
    asked = requests(config, group=8)
    rollouts = engine.generate(asked, SAMPLING)
    assert [(r.prompt_id, r.number) for r in rollouts] == [
        (f"a.tar/{p}", n) for p in range(len(PROMPTS)) for n in range(8)
    ]
    assert [rollout.seed for rollout in rollouts] == [seed for request in asked for seed in request.seeds]
    assert {rollout.finish for rollout in rollouts} == {"ended", "truncated", "media"}
    assert sum(rollout.forced for rollout in rollouts) >= 5
    assert largest_gap(trainer, asked, rollouts) <= LIMIT
    for rollout in rollouts:
        last = {"ended": SPECIAL.ends, "media": SPECIAL.media}.get(rollout.finish)
        assert last is None or rollout.tokens[-1] in last
        assert not set(rollout.tokens[:-1].tolist()) & {*SPECIAL.ends, *SPECIAL.media}
        if rollout.forced:
            assert rollout.tokens[16:19].tolist() == list(SPECIAL.forced)
            assert np.flatnonzero(rollout.inserted).tolist() == [16, 17, 18]
        assert np.isfinite(rollout.log_probs[~rollout.inserted]).all()


def test_published_weights_are_those_after_the_step(
    engine: EmbeddedEngine, trainer: TrainStep, config: GlmvConfig
) -> None:
    asked = requests(config)
    before = engine.generate(asked, SAMPLING)
    trainer.run(1, packs_of_step(config.variant, 1))
    assert largest_gap(trainer, asked, before) > 100 * LIMIT, "the step must move the policy"
    engine.publish(trainer, version=1)
    after = engine.generate(asked, SAMPLING)
    assert {rollout.version for rollout in after} == {1}
    assert largest_gap(trainer, asked, after) <= LIMIT


def test_greedy_responses_are_those_of_transformers(
    engine: EmbeddedEngine, reference: nn.Module, config: GlmvConfig
) -> None:
    """The reference generates on its own: with its positions, its cache, and one prompt after the other."""
    length = 80
    asked = [replace(request, seeds=(1,), prompt=replace(request.prompt, thinks=False)) for request in requests(config)]
    rollouts = engine.generate(asked, Sampling(0.0, 1, length, force_answer=False))
    ends = [*SPECIAL.ends, *SPECIAL.media]
    for rollout, sample in zip(rollouts, samples(config), strict=True):
        expected = greedy(reference, sample, length, ends)
        assert rollout.tokens.tolist() == expected
    assert max(len(rollout.tokens) for rollout in rollouts) > 64, "the cache must have grown"


def greedy(reference: Any, sample: TestSample, length: int, ends: list[int]) -> list[int]:
    ids = torch.from_numpy(sample.encoded.input_ids)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sample.encoded.grids:  # frame pairs as images, which transformers computes in the same way
        inputs["pixel_values"] = sample.pixel_values
        inputs["image_grid_thw"] = torch.tensor([(1, *grid) for grid in sample.encoded.grids])
        inputs["mm_token_type_ids"] = (sample.mm_token_type_ids[None] > 0).long()
    found = reference.generate(**inputs, max_new_tokens=length, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return found[0, ids.size(1) :].tolist()


@pytest.mark.parametrize("prompt", [1, 2, 4])
def test_first_tokens_have_the_distribution_of_transformers(
    engine: EmbeddedEngine, reference: nn.Module, config: GlmvConfig, prompt: int
) -> None:
    request = requests(config)[prompt]
    many = replace(
        request,
        seeds=tuple(seed_of(3, 1, request.prompt.id, number) for number in range(2000)),
        prompt=replace(request.prompt, thinks=False),
    )
    rollouts = engine.generate([many], Sampling(1.0, 1, 1, force_answer=False))
    with torch.no_grad():
        probabilities = transformers_logits(reference, samples(config)[prompt])[-1].double().softmax(0).numpy()
    order = np.argsort(probabilities)
    bins = np.minimum((np.cumsum(probabilities[order]) * 100).astype(int), 99)  # about 20 expected in each
    of_token = np.empty(len(order), int)
    of_token[order] = bins
    found = np.bincount(of_token[[rollout.tokens[0] for rollout in rollouts]], minlength=100)
    expected = 2000 * np.bincount(of_token, weights=probabilities, minlength=100)
    assert expected.min() > 5
    assert stats.chisquare(found, expected).pvalue > 0.01


# --- what a rollout depends on ----------------------------------------------------------------------------------------


def test_order_and_batches_do_not_matter(engine: EmbeddedEngine, trainer: TrainStep, config: GlmvConfig) -> None:
    asked = requests(config)
    rollouts = engine.generate(asked, SAMPLING)
    same(engine.generate(asked, SAMPLING), rollouts, limit=0)  # and the same bits again
    groups = {request.prompt.id: rollouts[3 * n : 3 * n + 3] for n, request in enumerate(asked)}
    limits: list[dict[str, Any]] = [{"rows": 1}, {"rows": 7}, {"cache_bytes": 1}]
    for options in limits:
        other = EmbeddedEngine(config, SPECIAL, torch.float32, **options)
        other.publish(trainer, version=0)
        shuffled = [asked[number] for number in (4, 1, 5, 0, 3, 2)]
        expected = [rollout for request in shuffled for rollout in groups[request.prompt.id]]
        same(other.generate(shuffled, SAMPLING), expected)
        same(other.generate(shuffled[1:2], SAMPLING), expected[3:6])


def test_rollouts_of_a_group_differ(engine: EmbeddedEngine, config: GlmvConfig) -> None:
    rollouts = engine.generate(requests(config, group=8), SAMPLING)
    assert len({rollout.tokens.tobytes() for rollout in rollouts}) == len(rollouts)


@pytest.mark.parametrize(
    ("layout", "trained"),
    [
        ("DP2", True),
        ("TP2", False),
        pytest.param("DP2", False, marks=pytest.mark.slow),
        pytest.param("TP2", True, marks=pytest.mark.slow),
        pytest.param("PP2", True, marks=pytest.mark.slow),
        pytest.param("CP2", True, marks=pytest.mark.slow),
    ],
)
def test_layout_does_not_matter(
    two_processes: Processes,
    engine: EmbeddedEngine,
    config: GlmvConfig,
    hf_folder: tuple[Path, nn.Module],
    trainer: TrainStep,
    layout: str,
    trained: bool,
) -> None:
    if layout == "TP2" and config.decoder.is_moe:
        layout = "TP2 SP"
    found = two_processes.run(
        roll_out, variant=config.variant, folder=str(hf_folder[0]), layout=layout, trained=trained
    )
    if trained:
        trainer.run(1, packs_of_step(config.variant, 1))
        engine.publish(trainer, version=1)
    expected = engine.generate(requests(config), SAMPLING)
    for rollouts in found:
        same(rollouts, expected, limit=1e-3 if trained else LIMIT)


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
@pytest.mark.parametrize("rank", [0, 1])
def test_request_to_stop_ends_the_drawing_of_all_leads(
    two_processes: Processes, engine: EmbeddedEngine, config: GlmvConfig, hf_folder: tuple[Path, nn.Module], rank: int
) -> None:
    """Between two tokens. What is drawn afterwards is what would have been."""
    found = two_processes.run(
        stopped_and_drawn_again, variant=config.variant, folder=str(hf_folder[0]), rank=rank, after=4
    )
    assert found[rank][0] == 4  # after the prompts, and after each token but the last
    assert found[1 - rank][0] > 8  # it has finished its own
    expected = engine.generate(requests(config), SAMPLING)
    for _, rollouts in found:
        same(rollouts, expected)


# --- router replay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
@pytest.mark.parametrize(
    "layout",
    ["DP2", "TP2 SP", pytest.param("PP2", marks=pytest.mark.slow), pytest.param("CP2", marks=pytest.mark.slow)],
)
def test_replaying_the_engine_with_its_own_weights_changes_nothing(
    two_processes: Processes, hf_folder: tuple[Path, nn.Module], layout: str
) -> None:
    """The experts are those that the policy chooses itself, until its weights change. Only last tokens have none."""
    for found in two_processes.run(
        engines_choice, variant=variant_of(hf_folder), folder=str(hf_folder[0]), layout=layout
    ):
        assert found.drawn > 50
        assert found.unlike == 0
        assert found.unlike_after_update > 1e-3
        assert found.unrouted == found.rollouts
        assert found.mismatch <= LIMIT
        assert found.first_deviation == 0


# --- cost and form ----------------------------------------------------------------------------------------------------


def test_images_of_a_prompt_are_embedded_once_for_its_group(engine: EmbeddedEngine, config: GlmvConfig) -> None:
    patches: list[int] = []
    visual: Any = engine.module.model.visual
    visual.register_forward_pre_hook(lambda _, inputs: patches.append(len(inputs[0])))
    asked = requests(config, group=8)
    engine.generate(asked, SAMPLING)
    assert sum(patches) == sum(h * w for request in asked for h, w in request.prompt.sample.grids)


def test_each_token_is_a_sign_of_progress(trainer: TrainStep, config: GlmvConfig) -> None:
    """Rolling out may take longer than a process may be silent."""
    signs: list[None] = []
    engine = EmbeddedEngine(config, SPECIAL, torch.float32, on_wait=lambda: signs.append(None))
    engine.publish(trainer, version=0)
    rollouts = engine.generate(requests(config), SAMPLING)
    assert len(signs) >= max(int((~rollout.inserted).sum()) for rollout in rollouts)


def test_nothing_asked_gives_nothing(engine: EmbeddedEngine) -> None:
    assert engine.generate([], SAMPLING) == []


def test_module_has_the_dtype_of_the_run_and_float32_expert_biases(
    build: Callable[..., GlmvModel], config: GlmvConfig
) -> None:
    trainer = TrainStep([build(dtype=torch.bfloat16).train()], OPTIMIZER, 2, SEQ_LENGTH)
    engine = EmbeddedEngine(config, SPECIAL, torch.bfloat16)
    engine.publish(trainer, version=0)
    module: Any = engine.module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}
    asked = requests(config, prompts=[[Text(9)], *PROMPTS[1:3]])
    assert largest_gap(trainer, asked, engine.generate(asked, SAMPLING)) <= 0.05
