"""A run in emulated FP8 resumes bit for bit: the scales of recipe delayed are part of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch import metrics, train
from tests.training.test_resume import set_back_to, stored_tensors, trace
from tests.training_data import config_file, shards

__all__ = ["config_file", "shards"]


def test_delayed_scales_resume_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    """With recomputed layers, and steps that are computed twice."""
    run = tmp_path / "run"
    keys = ["fp8.recipe=delayed", "recompute.decoder=full", "train.check_determinism=2", "train.deterministic=true"]
    train(config_file, keys, processes=1)
    lines, tensors = trace(run), stored_tensors(run)
    state = json.loads((run / "checkpoints" / "step_0000006" / "train_state.json").read_text())["fp8"]
    assert state["language_model.decoder.layers.3.mlp.experts.local_experts.7.linear_fc1"]["updates"] == 6

    set_back_to(run, step=3)
    train(config_file, keys, processes=1)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert trace(run) == lines
    assert stored_tensors(run) == tensors
