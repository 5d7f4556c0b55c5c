"""Bad steps: found as a brute-force search finds them; skipped without a trace; the same after a resume."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import read_train_state
from model.config import ConfigError
from model.glmv import GlmvModel
from tests.launch import fail, metrics, train
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, packs_of_step
from tests.processes import Processes
from tests.training import step_cases
from tests.training.step_cases import case_of
from training.bad_steps import BadStepDetector
from training.health import HealthConfig
from training.step import TrainStep
from training.step_errors import NonFiniteStep

EXPERTS_OVER_TWO = ["parallel.expert_model_parallel_size=2"]
TWO_STAGES = ["parallel.pipeline_model_parallel_size=2"]


# --- the detector -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(5))
def test_spikes_are_those_above_a_multiple_of_the_median_of_the_last_updates(seed: int) -> None:
    rng = random.Random(seed)
    config = HealthConfig(spike_factor=1.4, spike_window=7, on_spike="skip", max_skipped=1000)
    detector = BadStepDetector(config)
    updated: list[tuple[float, float]] = []
    skipped = 0
    for number in range(300):
        values = rng.uniform(1, 3), rng.uniform(1, 3)
        last = updated[-7:]
        spike = len(last) == 7 and any(
            value > 1.4 * statistics.median(column)
            for value, column in zip(values, zip(*last, strict=True), strict=True)
        )
        if number % 50 == 20:  # a run that is stopped and resumed
            state = json.loads(json.dumps(detector.state_dict()))
            detector = BadStepDetector(config)
            detector.load_state_dict(state)
        bad = detector.judge(*values)
        assert (bad is not None) == spike
        if spike:
            skipped += 1
        else:
            updated.append(values)
    assert 5 < skipped < 250


@pytest.mark.fast
def test_run_stops_after_the_allowed_number_of_skipped_steps_in_a_row() -> None:
    detector = BadStepDetector(HealthConfig(on_nonfinite="skip", max_skipped=2))
    actions = []
    for loss in (1.0, math.nan, math.inf, 1.0, math.nan, math.nan, math.nan):
        bad = detector.judge(loss, 1.0)
        actions.append(bad and bad.action)
    assert actions == [None, "skip", "skip", None, "skip", "skip", "stop"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"on_nonfinite": "warn"}, "health.on_nonfinite='warn': choose one of stop, skip"),
        ({"on_spike": "no", "spike_factor": 2.0}, "health.on_spike='no': choose one of warn, skip, stop"),
        ({"on_spike": "skip"}, "health.on_spike=skip has no effect while health.spike_factor is 0; set it"),
        ({"spike_factor": 0.5}, "health.spike_factor=0.5 would make every other step a spike; give more than 1, or 0"),
        ({"spike_factor": math.nan}, "health.spike_factor=nan: give 0 or a positive number"),
        ({"max_skipped": 0}, "health.max_skipped=0: give a positive number"),
        ({"spike_window": 0}, "health.spike_window=0: give a positive number"),
    ],
)
def test_contradictory_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HealthConfig(**keys)


# --- one step ---------------------------------------------------------------------------------------------------------


def final_norm(model: GlmvModel) -> Tensor:
    return model.language_model.decoder.final_layernorm.weight


@pytest.mark.parametrize(
    ("value", "reason"),
    [(3e38, r"the loss is (nan|inf)"), (3e30, r"the gradient norm is inf, the loss .*")],
)
def test_policy_of_a_step_that_is_not_finite(build: Callable[..., GlmvModel], value: float, reason: str) -> None:
    """Weights that are finite, but too large for the loss or for the norm of its gradient. Nothing is updated."""
    for policy in ("skip", "stop"):
        model = build(expert_bias_update_rate=1e-3).train()
        trainer = TrainStep([model], OPTIMIZER, 3, SEQ_LENGTH, health=HealthConfig(on_nonfinite=policy))
        trainer.run(1, packs_of_step(model.glmv_config.variant, 1))
        with torch.no_grad():
            final_norm(model)[0] = value
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
        if policy == "stop":
            with pytest.raises(NonFiniteStep, match=f"step 2: {reason}$"):
                trainer.run(2, packs_of_step(model.glmv_config.variant, 2))
        else:
            report = trainer.run(2, packs_of_step(model.glmv_config.variant, 2))
            assert report.bad is not None
            assert re.fullmatch(reason, report.bad.reason)
        assert trainer.updates == 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_step_that_is_skipped_leaves_no_trace(hf_folder: Any) -> None:
    """Three steps with a bad one in between equal two steps: weights, moments, step counts and biases, to the bit."""
    with Processes(2) as processes:
        for layout in ("EP2", "PP2 VPP2", "DP2"):
            for rank in processes.run(step_cases.train_over_a_bad_step, layout=layout, **case_of(hf_folder)):
                assert rank == {"skipped": [2], "differences": [], "compared": rank["compared"]}, layout
                assert rank["compared"] > 20


# --- a run ------------------------------------------------------------------------------------------------------------


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """Return the checksums of the files with weights and optimizer state."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.startswith("state/") and name.endswith(".distcp")}


# Real losses that only scatter, and a factor so small that their scatter is a spike.
SKIP_SPIKES = [
    *("health.on_spike=skip", "health.spike_factor=1.001", "health.spike_window=2", "health.max_skipped=9"),
    *("optimizer.lr=1e-6", "optimizer.min_lr=1e-7", "optimizer.warmup_steps=0"),
    *("train.deterministic=true", "train.steps=8", "checkpoint.save_interval=1"),
]


def skipped_steps(run: Path) -> list[int]:
    """Check that a run with SKIP_SPIKES skipped the steps that it should, without a trace, and return them."""
    lines = metrics(run)
    expected: list[int] = []
    updated: list[tuple[float, float]] = []
    for line in lines:
        values = (line["loss"], line["grad_norm"])
        last = list(zip(*updated[-2:], strict=True))
        if len(updated) >= 2 and any(v > 1.001 * statistics.median(c) for v, c in zip(values, last, strict=True)):
            expected.append(line["step"])
        else:
            updated.append(values)
    assert [line["step"] for line in lines if line.get("skipped")] == expected
    assert 2 <= len(expected) <= 5
    for line in lines:
        step = line["step"]
        now, before = (tensors_of(run / "checkpoints" / f"step_{n:07d}") for n in (step, step - 1 or 1))
        assert (now == before) == (step in expected or step == 1)
        state = read_train_state(run / "checkpoints" / f"step_{step:07d}")
        assert state.updates == step - sum(s <= step for s in expected)
    assert sorted(int(file.stem.removeprefix("step_")) for file in (run / "bad_steps").iterdir()) == expected
    return expected


def numbers(run: Path) -> list[dict[str, Any]]:
    """Return the metrics without those of time."""
    return [{key: line.get(key) for key in ("step", "loss", "grad_norm", "lr", "skipped")} for line in metrics(run)]


@pytest.mark.parametrize("layout", [EXPERTS_OVER_TWO, pytest.param(TWO_STAGES, marks=pytest.mark.slow)])
def test_spikes_are_skipped_exactly_and_equally_after_a_resume(
    config_file: Path, tmp_path: Path, layout: list[str]
) -> None:
    run = tmp_path / "run"
    train(config_file, [*layout, *SKIP_SPIKES])
    first = skipped_steps(run)[0]
    lines = numbers(run)
    # Set back into the middle of the skipped steps: the same decisions, the same numbers.
    (run / "checkpoints" / "latest").write_text(f"step_{first:07d}\n")
    train(config_file, [*layout, *SKIP_SPIKES])
    assert numbers(run) == lines


def test_losses_that_are_not_finite_are_skipped_then_stop_the_run(config_file: Path, tmp_path: Path) -> None:
    """A learning rate that makes weights huge in the first step: no later loss is finite."""
    rate = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip_grad=0"]
    policy = ["health.on_nonfinite=skip", "health.max_skipped=3"]
    saving = ["checkpoint.save_interval=1", "checkpoint.async_save=true"]  # the last save may not be done at the end
    errors = fail(config_file, [*rate, *policy, *saving])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = [json.loads(line, parse_constant=refuse) for line in lines]
    skipped = [line["step"] for line in read if line.get("skipped")]
    first = skipped[0]
    assert skipped == [first, first + 1, first + 2]
    assert all(line["loss"] is None and line["grad_norm"] is None for line in read if line.get("skipped"))
    assert len({line["lr"] for line in read}) == len(read)  # the schedule continues
    assert all(f"step {first + 3}: the loss is " in error for error in errors)
    assert all("the 3 steps before it were skipped (health.max_skipped)" in error for error in errors)
    ended = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (ended["state"], ended["step"]) == ("failed", first + 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    states = [tensors_of(checkpoints / f"step_{step:07d}") for step in range(first - 1, first + 3)]
    assert states[0]
    assert all(state == states[0] for state in states)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"step {first} was skipped: the loss is" in log
