"""Errors that a user can fix: one line, no stack trace, exit code 2."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.storage import StorageError
from data_pipeline.errors import DataError
from model.config import ConfigError
from model.errors import CheckpointError, ImageTokenError, WeightsError
from training.ranks import local_rank, rank, started_by_torchrun
from training.run_errors import NodeError, NonDeterministicStep, RunFolderError
from training.step_errors import StepError

EXPECTED_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    WeightsError,
    ImageTokenError,
    StepError,
    NonDeterministicStep,
    RunFolderError,
    StorageError,
)
GRACE_SECONDS = 30.0  # in which the main process prints an error that all processes find


@contextmanager
def expected_errors(*, on_every_process: bool) -> Iterator[None]:
    """Turn an expected error into a line on stderr and SystemExit(2).

    Args:
        on_every_process: whether each process prints its own error. Before the processes have joined they all find the
            same error, and only the main process prints it; one of a machine is printed by that machine, and one of
            storage by each process that meets it.
    """
    try:
        yield
    except EXPECTED_ERRORS as error:
        is_own = on_every_process or isinstance(error, StorageError)
        where = f" on rank {rank()}" if on_every_process else ""
        if not is_own and (local_rank() if isinstance(error, NodeError) else rank()) != 0:
            if not started_by_torchrun():
                raise SystemExit(2) from None
            # torchrun ends the other processes as soon as one has ended: if this one ended first, the main process
            # could not print. So the signal is awaited here. If none comes, the error is this process's own.
            time.sleep(GRACE_SECONDS)
            where = f" on rank {rank()}"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
