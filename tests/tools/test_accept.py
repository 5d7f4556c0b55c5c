"""tools.accept on a machine without a GPU: real runs of two processes, and runs that do not agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.training_data import config_file, shards
from tools.accept import app
from tools.acceptance import LAYOUTS, STEPS, Runs, difference, fits, options, this_machine

__all__ = ["config_file", "shards"]


def accept(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"}, catch_exceptions=False)
    return done.exit_code, done.output


@pytest.mark.slow
def test_all_parts_pass(config_file: Path, tmp_path: Path) -> None:
    code, output = accept("--config", config_file, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "accept.json").read_text())
    assert code == 0, output
    assert found["passed"]
    passed = [row["check"] for row in found["checks"] if row["result"] == "passed"]
    assert passed == [*(f"{name} fp32" for name in LAYOUTS if fits(name, 2)), "fp32", "to Hugging Face and back"]
    others = {row["reason"] for row in found["checks"] if row["result"] != "passed"}
    assert others == {"needs a GPU and Transformer Engine"}


def test_run_that_fails_is_named_with_its_log(config_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(config_file.read_text().replace("optimizer:", "optimiser:"))
    code, output = accept("--config", broken, "--out", tmp_path / "out", "--part", "export")
    assert code == 1
    assert f"see {tmp_path}/out/export.log" in output.replace("\n", "")
    assert "optimiser" in (tmp_path / "out" / "export.log").read_text()


@pytest.mark.slow
def test_other_data_is_a_difference(config_file: Path, tmp_path: Path) -> None:
    runs, keys = Runs(config_file, tmp_path / "runs", 300), options("fp32", this_machine(1))
    run, other = (runs.train(f"seed {seed}", 1, [*keys, f"data.seed={seed}"]) for seed in (1, 2))
    assert difference(run, run, "fp32") == "loss 0.0e+00, grad_norm 0.0e+00"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    with pytest.raises(Exception, match="above the limit; compare"):
        difference(run, other, "fp32")


@pytest.mark.fast
def test_wrong_calls_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for words, message in {
        ("--part", "layout"): "error: --part layout is unknown; choose among layouts, backend, resume, export",
        ("--config", "no.yaml"): "error: --config no.yaml does not exist; run this from the root of the repository",
        (
            "--out",
            str(tmp_path / "mine"),
        ): f"error: --out {tmp_path}/mine is not empty, and not the folder of an earlier",
    }.items():
        code, output = accept(*words)
        assert (code, output.startswith(message)) == (2, True), output


@pytest.mark.fast
def test_layouts_that_fit() -> None:
    assert [name for name in LAYOUTS if fits(name, 1)] == []
    assert [name for name in LAYOUTS if fits(name, 2)] == [
        "DP",
        "TP2 SP",
        "PP2",
        "PP2 VPP2",
        "CP2",
        "EP2",
        "ETP2",
        "TP2 SP EP2",
    ]
    assert set(LAYOUTS) == {name for name in LAYOUTS if fits(name, 8)}
