"""Runs that stop at a step: the error says why, and the step's samples are listed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.launch import fail, metrics
from tests.training_data import build, sentence


def test_samples_of_a_step_that_is_not_finite_are_listed(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    errors = fail(config_file, ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip_grad=0"])
    steps = len(metrics(run))
    assert 1 <= steps < 6
    files = f"{run}/nonfinite_step_{steps + 1}_rank_*.json"
    assert set(errors) <= {
        f"step {steps + 1}: the loss is {loss}; its samples are listed in {files}" for loss in ("nan", "inf")
    }
    lists = [json.loads(file.read_text()) for file in run.glob("nonfinite_step_*_rank_*.json")]
    assert len(lists) == 2  # one per data-parallel rank
    for listed in lists:
        assert listed["step"] == steps + 1
        assert len(listed["packs"]) == 2
        names = [name for names in listed["packs"] for name in names]
        assert names
        assert all(re.fullmatch(r"(images|text|videos)-.*\.tar/.+", name) for name in names)


def test_chats_without_their_answers_do_not_train_at_loss_0(
    config_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """data.too_long=truncate cuts every answer off."""
    messages = [{"role": "user", "content": sentence(1, 300)}, {"role": "assistant", "content": sentence(2, 5)}]
    (tmp_path / "data").mkdir()
    chats = [{"domain": "chat", "messages": messages, "thinking": False} for _ in range(40)]
    source = build(tmp_path / "data" / "long_chats", chats, tokenizer_folder)
    options = [f"data.sources=[{{path: {source}}}]", "data.too_long=truncate", "data.max_quarantined_fraction=1"]
    errors = fail(config_file, options, processes=1)
    assert re.search(r"carries loss; look at their sources, and at data.too_long|no sample of the global", errors[0])
    assert not metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
