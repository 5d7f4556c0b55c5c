"""Requests to stop while rollouts are drawn: obeyed at once by all processes, and the run that resumes is the same."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import finish, has_reached, process_of_rank, start, train, wait_until
from tests.rl.run_files import ENTRY, assert_same, has_rollouts

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
# Rollouts that are drawn group by group take several seconds: a signal soon after they have begun is in time.
LONG: dict[str, Any] = {
    "train": {"steps": 2},
    "rl": {"prompts": 64, "group": 8, "updates": 1},
    "rollout": {"embedded_cache_gb": 1e-9},
    "expansion": {"enabled": False},
}
WITHOUT_VALIDATION: dict[str, Any] = {"validation": {"sources": [], "interval": 0}}
SOON = 0.3  # seconds


def is_running(run: Path, step: int) -> bool:
    """Whether the run has come to where it validates a step that it resumed from."""
    file = run / "state.json"
    return file.exists() and json.loads(file.read_text())["state"] == "running"


def stop(launcher: Any, run: Path, rank: int, *, when: Callable[[Path, int], bool], step: int) -> str:
    """Send SIGTERM to one rank soon after a condition has come true, and return what the run printed."""
    wait_until(when, launcher, run, step=step)
    time.sleep(SOON)
    process_of_rank(launcher, rank).send_signal(signal.SIGTERM)
    output = finish(launcher)
    assert launcher.returncode, output
    return output


@pytest.mark.parametrize(
    ("processes", "layout", "rank"),
    [
        (2, [], 1),
        pytest.param(1, [], 0, marks=pytest.mark.slow),
        pytest.param(2, [], 0, marks=pytest.mark.slow),
        pytest.param(2, TP2, 1, marks=pytest.mark.slow),
    ],
    ids=["DP2 rank 1", "1 process", "DP2 rank 0", "TP2 SP rank 1"],
)
def test_run_that_is_stopped_while_it_rolls_out_continues_bit_for_bit(
    rl_config: Callable[..., Path], tmp_path: Path, processes: int, layout: list[str], rank: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(rl_config(whole, **LONG, **WITHOUT_VALIDATION), layout, entry=ENTRY, processes=processes)
    config = rl_config(run, **LONG, **WITHOUT_VALIDATION)
    launcher = start(config, layout, entry=ENTRY, processes=processes)
    output = stop(launcher, run, rank, when=has_reached, step=1)
    assert f"stopped at step 1 by SIGTERM on rank {rank}; the same command resumes" in output
    assert json.loads((run / "state.json").read_text())["state"] == "stopped"
    assert re.search(r"exitcode\s*: 75 ", output)  # as torchrun reports it
    assert not has_rollouts(run, 2)
    train(config, layout, entry=ENTRY, processes=processes)
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_validation_that_is_stopped_while_it_draws_is_done_again(
    rl_config: Callable[..., Path], tmp_path: Path, processes: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = {"train": {"steps": 2}, "rollout": {"embedded_cache_gb": 1e-9}}
    train(rl_config(whole, **changes), entry=ENTRY, processes=processes)
    config = rl_config(run, **changes)
    launcher = start(config, entry=ENTRY, processes=processes)
    output = stop(launcher, run, processes - 1, when=is_running, step=0)
    assert "the validation at step 0 is given up, because the run was asked to stop" in output
    assert "stopped at step 0 by SIGTERM" in output
    train(config, entry=ENTRY, processes=processes)
    assert_same(run, whole)
