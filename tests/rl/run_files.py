"""Runs of reinforcement learning that are killed, and what the files of two runs must have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch import finish, metrics, process_of_rank, start, train

ENTRY = "rl.train"
TIMES = ("seconds", "per_second", "tflops", "memory", "mfu")  # parts of the keys that differ between runs


def kill_and_resume(config: Path, kill_when: Callable[[Any], None]) -> None:
    """Kill a run of one process once `kill_when`, which gets its launcher, returns; then run it to its end."""
    launcher = start(config, entry=ENTRY, processes=1)
    kill_when(launcher)
    process_of_rank(launcher, 0).kill()
    finish(launcher)
    train(config, entry=ENTRY, processes=1)


def lasting(line: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal in two runs."""
    return {key: value for key, value in line.items() if not any(part in key for part in TIMES)}


def assert_same(run: Path, other: Path) -> None:
    """Check that metrics, validation, rollouts and the last weights of two runs are equal bit for bit."""
    without_reuse = [
        [{k: v for k, v in lasting(line).items() if k != "rollout/reused"} for line in metrics(each)]
        for each in (run, other)
    ]
    assert without_reuse[0] == without_reuse[1]
    read = [validations(each) for each in (run, other)]
    assert read[0] == read[1]
    names = sorted(file.name for file in (run / "rollouts").iterdir())
    assert names == sorted(file.name for file in (other / "rollouts").iterdir())
    for name in names:
        assert (run / "rollouts" / name).read_bytes() == (other / "rollouts" / name).read_bytes(), name
    assert stored_tensors(run) == stored_tensors(other)


def validations(run: Path) -> list[dict[str, Any]]:
    """Return the lines of validation.jsonl, without times."""
    file = run / "validation.jsonl"
    return [lasting(json.loads(line)) for line in file.open()] if file.exists() else []


def stored_tensors(run: Path) -> dict[str, object]:
    """Return the checksums of weights and optimizer state in the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step_*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {f"{newest.name}/{name}": entry for name, entry in files.items() if name.endswith(".distcp")}


def has_rollouts(run: Path, step: int) -> bool:
    """Whether the rollouts of an iteration are on disk."""
    return (run / "rollouts" / f"step_{step:07d}.npz").exists()
