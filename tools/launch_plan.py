"""Whether a run fits the GPUs of its job, by tools.plan in a process of its own, which sees no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from model.config import ConfigError, GlmvConfig
from model.rank_sizes import parameters_by_rank
from training.config import RunConfig
from training.dry_run import one_stage

SMALL = 10**9  # parameters: a smaller model is not worth a minute of planning
DOES_NOT_FIT = 3  # exit status of tools.plan


def check_fits(
    files: Sequence[Path], keys: Sequence[str], config: RunConfig, processes: int, gpu_memory: float
) -> None:
    """Check that a run fits the memory of its GPUs.

    Runs that name no preset, and small models, are not planned.

    Args:
        files: The run's YAML files.
        keys: Overrides of their keys.
        config: What these say.
        processes: Number of GPUs.
        gpu_memory: GiB of a GPU.

    Raises:
        ConfigError: It does not fit; the message names what would.
    """
    if not config.model.preset or _parameters(config) < SMALL:
        return
    command = [sys.executable, "-m", "tools.plan", "--skip-files", "--world-size", str(processes)]
    command += ["--gpu-memory", str(gpu_memory), *(word for file in files for word in ("--config", str(file))), *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode == DOES_NOT_FIT:
        verdict = done.stdout[done.stdout.index("DOES NOT FIT") :].strip()
        raise ConfigError(
            f"{files[0]} on {processes} GPUs: {verdict}\nchange it, or give --no-plan to submit it anyway"
        )
    if done.returncode:
        raise ConfigError(f"{files[0]}: tools.plan failed; give --no-plan to go without: {done.stderr.strip()[-500:]}")


def _parameters(config: RunConfig) -> int:
    model = GlmvConfig.from_preset(config.model.preset)
    return sum(sum(one.values()) for one in parameters_by_rank(model, type(config.parallel)(), one_stage(model)))
