"""Optimizer states below float32 and in main memory: what needs a GPU's fused Adam, or a GPU to leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.installed import has_transformer_engine
from tests.launch import finish, has_reached, kill_rank_when, metrics, start, train
from tests.training.test_resume import trace

BF16 = ["train.precision=bf16", "train.deterministic=true"]
OPTIONS = {
    "bf16-gradients": ["optimizer.main_grads=bf16"],
    "bf16-moments": ["optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"],
    "fp16-moments": [
        "optimizer.exp_avg_dtype=fp16",
        "optimizer.exp_avg_sq_dtype=fp16",
        "optimizer.main_grads=bf16",
    ],
    "half-offloaded": ["optimizer.offload_fraction=0.5"],
    "all-offloaded": ["optimizer.offload_fraction=1.0"],
}
pytestmark = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_are_close_to_float32_states_and_resume_is_bit_for_bit(
    config_file: Path, tmp_path: Path, options: list[str]
) -> None:
    plain, whole, killed = (tmp_path / name for name in ("plain", "whole", "killed"))
    train(config_file, [*BF16, f"train.output_dir={plain}", "checkpoint.save_interval=0"], processes=1)
    train(config_file, [*BF16, *options, f"train.output_dir={whole}", "checkpoint.save_interval=0"], processes=1)
    for line, expected in zip(metrics(whole), metrics(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)

    command = [*BF16, *options, f"train.output_dir={killed}"]
    launcher = start(config_file, command, processes=1)
    kill_rank_when(has_reached, launcher, killed, step=5, rank=0)
    finish(launcher)
    train(config_file, command, processes=1)
    assert trace(killed) == trace(whole)
