"""What a run says of errors that users can mend: one line, no stack trace, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.errors import DataError
from model.checkpoint import CheckpointError
from model.config import ConfigError
from model.embedding_exchange import ImageTokenError
from model.safetensors_folder import WeightsError
from training.determinism import NonDeterministicStep
from training.distributed import rank
from training.step import NonFiniteStep

EXPECTED_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    WeightsError,
    ImageTokenError,
    NonFiniteStep,
    NonDeterministicStep,
)


@contextmanager
def expected_errors(*, on_every_process: bool) -> Iterator[None]:
    """Turn an expected error into a line on stderr and SystemExit(2).

    on_every_process: whether a process speaks for itself. Before the processes have joined they all find the same, and
    only the main one says it.
    """
    try:
        yield
    except EXPECTED_ERRORS as error:
        if on_every_process or rank() == 0:
            where = f" on rank {rank()}" if on_every_process else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
