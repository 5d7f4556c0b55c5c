"""A window of steps under torch's profiler: RUN/profile/rank_N.json.gz, which opens in Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from training.metrics_config import ProfileConfig

PROFILES = "profile"
logger = logging.getLogger("glmv")


class StepProfiler:
    """Profiles the window's steps on this rank, and writes the trace after the last of them.

    Args:
        config: the window.
        folder: the run folder.
        rank: this process.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        chosen = config.start and rank in config.ranks
        self._window = range(config.start, config.start + config.steps) if chosen else range(0)
        self._file = folder / PROFILES / f"rank_{rank}.json.gz"
        self._profiler: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the body if step `number` is in the window; its marker in the trace is `step N`."""
        if number not in self._window:
            yield
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.accelerator.is_available() else [])]
            self._profiler = profile(activities=activities)
            self._profiler.start()
        with record_function(f"step {number}"):
            yield
        if number == self._window[-1]:
            self.close()

    def close(self) -> None:
        """End the window, and write its trace; does nothing outside of it. A full disk costs the trace, not the run."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._window = self._profiler, None, range(0)
        profiler.stop()
        unfinished = self._file.with_name(f".unfinished_{self._file.name}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(self._file)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self._file, error.strerror or error)
