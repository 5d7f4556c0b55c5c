"""tools.fp8_check against a run and against torch's own backward pass, which knows no ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from data_pipeline.encoding.batch import Batch
from model.config import GlmvConfig
from model.fp8 import Fp8Config
from model.weights.load import RandomWeights
from model.whole_model import build_whole_model
from tests.launch import ROOT, metrics, train
from tests.training_data import config_file, shards
from tools.fp8_check import app
from training.config import RunConfig, load_config
from training.fp8_distance import module_of
from training.setup import build_loader
from training.step import forward

__all__ = ["config_file", "shards"]

KEYS = ["model.preset=tiny_dense", "fp8.recipe=blockwise", "train.seed=5"]


def check(config: Path, out: Path, *options: str, expect: int = 0) -> Any:
    """Run tools.fp8_check on two processes and return what it writes as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["tools.fp8_check", "--config", str(config), *KEYS, "--steps", "2", "--json", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "EMULATED by the torch backend" in done.stdout
    assert ("NOT within the limits" in done.stdout) == bool(expect)
    return json.loads(out.read_text())


def gradients(packs: Sequence[Batch], fp8: Fp8Config) -> dict[str, Tensor]:
    """Return the gradients of the mean loss of packs, in one process, without DDP."""
    config = GlmvConfig.from_preset("tiny_dense")
    model: Any = build_whole_model(config, RandomWeights(config, 5), fp8=fp8).train()
    tokens = sum(pack.num_loss_tokens for pack in packs)
    for pack in packs:
        ((forward(model, pack) * pack.loss_mask).sum() / tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_distances_on_two_ranks_are_those_of_one_process(
    config_file: Path, tmp_path: Path, single_process: None
) -> None:
    found = check(config_file, tmp_path / "distance.json", "--max-gradient", "0.0", expect=1)
    assert not (tmp_path / "run").exists()

    packs = build_loader(load_config(RunConfig, config_file, KEYS), GlmvConfig.from_preset("tiny_dense")).next_step()
    base, fp8 = (gradients(packs, Fp8Config(recipe=recipe)) for recipe in ("none", "blockwise"))
    squares: dict[str, list[float]] = {}
    for name, gradient in base.items():
        sums = squares.setdefault(module_of(name), [0.0, 0.0])
        sums[0] += float((fp8[name] - gradient).square().sum())
        sums[1] += float(gradient.square().sum())
    relative = {name: (difference / size) ** 0.5 for name, (difference, size) in squares.items()}
    assert {module["module"]: module["relative"] for module in found["modules"]} == pytest.approx(relative, rel=1e-2)
    whole = (sum(difference for difference, _ in squares.values()) / sum(size for _, size in squares.values())) ** 0.5
    assert found["gradient"]["relative"] == pytest.approx(whole, rel=1e-2)
    assert 0.02 < whole < found["limits"]["gradient"] or found["limits"]["gradient"] == 0

    train(config_file, [*KEYS, "train.steps=6", "checkpoint.save_interval=0"], processes=1)
    losses = [line["loss"] for line in metrics(tmp_path / "run")][:2]
    assert found["fp8_losses"] == pytest.approx(losses, rel=1e-5)
    assert found["loss_distances"][1] == pytest.approx(losses[1] / found["losses"][1] - 1, abs=1e-5)


def test_a_configuration_without_a_recipe(config_file: Path) -> None:
    result = CliRunner().invoke(app, ["--config", str(config_file), "fp8.recipe=none"])
    assert result.exit_code == 2
    assert "error: fp8.recipe=none leaves nothing to compare: add fp8.recipe=blockwise" in result.output
