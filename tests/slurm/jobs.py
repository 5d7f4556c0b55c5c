"""Submit the shipped job scripts as a user does, on nodes without GPUs, and compare what the runs leave behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.launch import ROOT, has_reached
from tests.slurm.cluster import Cluster, wait_for

ON_CPUS = {
    "PYTHON": sys.executable,
    "GPUS_PER_NODE": "0",
    "NPROC_PER_NODE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "CHECK_NODES": "0",
    "END_SECONDS": "4",
}


def submit_training(
    cluster: Cluster,
    script: str,
    config: Path | None,
    run: Path,
    *overrides: str,
    options: tuple[str, ...] = (),
    **variables: str,
) -> int:
    """Submit slurm/SCRIPT on two nodes, from the root of the clone.

    The job gets the nodes' GPUs, which are files that nobody opens, and trains with one process per node on the CPU.
    """
    settings = {"CONFIG": str(config or ""), "OUTPUT_DIR": str(run), **ON_CPUS, **variables}
    log = f"--output={run.parent / run.name}.log"
    words = ("--nodes=2", log, *options, f"slurm/{script}", *overrides)
    return cluster.submit(*words, cwd=ROOT, variables=settings)


def submit_chain(cluster: Cluster, files: Sequence[Path], *keys: str) -> list[int]:
    """Let tools.launch submit a chain on two nodes, and return the jobs; their logs lie beside the run folders."""
    options = ["--nodes", "2", "--gpus-per-node", "0", "--processes-per-node", "1", "--submit", "--time", "30"]
    options += ["--sbatch", f"output={files[0].parent}/%x.log"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.launch", *options, "--chain", *map(str, files), *keys],
        cwd=ROOT,
        env={**cluster.environment, **ON_CPUS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(line.split()[0]) for line in done.stdout.splitlines()]


def shard_files(folder: Path) -> dict[str, str]:
    """Return the hashes of all tars in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.tar"))}


def log_of(run: Path) -> str:
    """Return what the job of a run has printed."""
    file = run.parent / f"{run.name}.log"
    return file.read_text() if file.exists() else "(no log)"


def state(run: Path) -> dict[str, Any]:
    """Return the state that the run has written."""
    return dict(json.loads((run / "state.json").read_text()))


def tensors(run: Path, step: int) -> dict[str, object]:
    """Return the checksums of weights and optimizer state in a checkpoint of a run."""
    files = json.loads((run / "checkpoints" / f"step_{step:07d}" / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


def weight_files(folder: Path) -> dict[str, str]:
    """Return the hashes of all safetensors files in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.safetensors"))}


def wait_for_log(run: Path, text: str, times: int = 1, timeout: float = 120) -> None:
    """Wait until the job of a run has printed `text` this number of times."""
    try:
        wait_for(lambda: log_of(run).count(text) >= times, f"{text!r} in the log of {run}", timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}:\n{log_of(run)}") from None


def wait_for_step(run: Path, step: int, timeout: float = 120) -> None:
    """Wait until a run has recorded a step."""
    try:
        wait_for(lambda: has_reached(run, step), f"step {step} of {run}", timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}:\n{log_of(run)}") from None
