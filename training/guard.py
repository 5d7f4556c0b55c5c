"""What surrounds a run once its processes have joined: requests to stop, the watchdog, and how errors end it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from training.config import RunConfig
from training.errors import EXPECTED_ERRORS, expected_errors
from training.run_state import EXIT_FAILED, FAILED, read_state, write_state
from training.signals import StopRequests
from training.watchdog import EXIT_GONE, Watchdog, tell

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


@dataclass
class Guard:
    """Handed to the run: it says where it stands, and asks whether to stop."""

    watchdog: Watchdog
    requests: StopRequests


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
            watchdog = Watchdog(config.health, folder, lambda: requests.received != 0)
        try:
            with _errors_end_the_run(config, watchdog):
                yield Guard(watchdog, requests)
        finally:
            watchdog.close()


@contextmanager
def _errors_end_the_run(config: RunConfig, watchdog: Watchdog) -> Iterator[None]:
    """Turn an expected error and the loss of a process into one line and an exit code, and let all processes know."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        print(f"error on rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        if watchdog.announce_error(str(error), EXIT_FAILED):
            folder = Path(config.train.output_dir)
            step = watchdog.step or read_state(folder).get("step", 0)  # 0: it has not resumed yet
            write_state(folder, FAILED, step, config.train.steps, str(error))
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:
        if not is_lost_peer(error):
            watchdog.announce_error(f"{type(error).__name__}: {error}", exit_code=1)
            raise
        if text := watchdog.explain_loss():
            tell(text)
        raise SystemExit(EXIT_GONE) from None


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed because another process is gone."""
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)
