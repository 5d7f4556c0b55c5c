"""Which stage a configuration is of, and the commands that are not made for runs of reinforcement learning."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rl.config import RlConfig
from tests.launch import ROOT
from tools import fp8_check, plan, replay, view
from tools.run_config import load_run
from training.config import RunConfig

RL = ROOT / "configs/tiny/rl.yaml"


@pytest.mark.fast
def test_stage_is_known_by_its_name_and_by_its_sections(tmp_path: Path) -> None:
    assert type(load_run(RL)) is RlConfig
    assert type(load_run(RL, ["train.stage="])) is RlConfig
    assert type(load_run(ROOT / "configs/glm45v/sft.yaml")) is RunConfig
    assert type(load_run(ROOT / "configs/glm45v/sft.yaml", ["train.stage="])) is RunConfig


@pytest.mark.parametrize(
    ("app", "words", "instead"),
    [
        (view.app, ["batch", "--config", RL], "`tools.report RUN` shows rollouts"),
        (fp8_check.app, ["--config", RL], "compare on the data of the stage before"),
        (replay.app, ["RUN", 3], "`tools.report RUN` shows them"),
        (
            plan.app,
            ["--config", "configs/tiny/sft.yaml", "--skip-files", "model.preset=tiny_moe", "--calibrate", "RUN"],
            "most of its steps' time is that of rollouts",
        ),
    ],
    ids=["view", "fp8_check", "replay", "calibrate"],
)
def test_command_refuses_a_run_of_reinforcement_learning(
    app: object, words: list[object], instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shutil.copyfile(RL, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0, "step_seconds": 1.0}\n')
    (tmp_path / "log.txt").write_text("")
    given = [str(tmp_path) if word == "RUN" else str(word) for word in words]
    done = CliRunner().invoke(app, given)  # type: ignore[arg-type]
    assert done.exit_code != 0
    assert "is a run of reinforcement learning: " in done.stderr
    assert instead in done.stderr
    assert done.stderr.count("\n") == 1
