"""What surrounds a run once its processes have joined: requests to stop, the watchdog, and how errors end it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from training.config import RunConfig
from training.errors import EXPECTED_ERRORS, expected_errors
from training.run_state import EXIT_FAILED, FAILED, read_state, write_state
from training.signals import StopRequests
from training.watchdog import EXIT_GONE, Watchdog, exit_soon, tell

# What torch says where another process is gone, in errors that are of no kind of their own.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
)


class Guard:
    """Handed to the run: it says where it stands, asks whether to stop, and announces the error that ends it."""

    def __init__(self, config: RunConfig, watchdog: Watchdog, requests: StopRequests) -> None:
        self.config, self.watchdog, self.requests = config, watchdog, requests
        self._announced: Exception | None = None

    def announce(self, error: Exception) -> None:
        """Print an error that ends the run, and let all processes know; once. Not for the loss of a process."""
        if is_lost_peer(error) or error is self._announced:
            return
        self._announced = error
        if not isinstance(error, EXPECTED_ERRORS):
            self.watchdog.announce_error(f"{type(error).__name__}: {error}")
            return
        print(f"error on rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        if self.watchdog.announce_error(str(error)):
            folder = Path(self.config.train.output_dir)
            step = self.watchdog.step or read_state(folder).get("step", 0)  # 0: it has not resumed yet
            write_state(folder, FAILED, step, self.config.train.steps, str(error))


@contextmanager
def guarded(config: RunConfig) -> Iterator[Guard]:
    """Watch over a run. Collective at the start.

    Yields:
        What the run uses while it lasts.

    Raises:
        SystemExit: 2 after an error that the user must fix, which is printed; another code after the loss of a process.
    """
    folder = Path(config.train.output_dir)
    with StopRequests(folder).listening() as requests:
        with expected_errors(on_every_process=True):
            if dist.get_rank() == 0:
                requests.forget_old_file()  # before the watchdog looks for one
            watchdog = Watchdog(config.health, folder, requests)
        try:
            with _errors_end_the_run(guard := Guard(config, watchdog, requests)):
                yield guard
        finally:
            watchdog.close()


@contextmanager
def _errors_end_the_run(guard: Guard) -> Iterator[None]:
    """Turn an expected error and the loss of a process into one line and an exit code."""
    try:
        yield
    except Exception as error:
        guard.announce(error)
        if is_lost_peer(error):
            if text := guard.watchdog.explain_loss():
                tell(text)
            raise SystemExit(EXIT_GONE) from None
        if isinstance(error, EXPECTED_ERRORS):
            exit_soon(EXIT_FAILED)
            raise SystemExit(EXIT_FAILED) from None
        exit_soon(1)
        raise


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed because another process is gone, also as the cause of another error.

    A checkpoint that is loaded or saved meanwhile does not load, or cannot be written: that is not its fault.
    """
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER):
        return True
    causes = [error.__cause__] if error.__cause__ is not None else []
    if isinstance(error, CheckpointException):
        causes += [failed for failed, _ in error.failures.values()]
    return any(map(is_lost_peer, causes))
