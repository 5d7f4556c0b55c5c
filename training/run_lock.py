"""One run at a time in a run's folder: its main process holds a lock on a file there.

    RUN/run.lock        {"host": "node-17", "pid": 4711}: whose lock it is, or was

The lock is the kernel's. It ends with the process, however that ends; the file stays, and alone means nothing. It is a
POSIX record lock and no flock: that one would be shared with the loader's forked workers, who outlive a killed run by
seconds. In turn it is lost when the process that holds it opens and closes the file once more, which nobody does.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from model.config import ConfigError
from training.distributed import rank
from training.metrics import logger

RUN_LOCK = "run.lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[str]:
    """Holds the lock of a run's folder, on the main process alone. Gives why it could not be had, for `agree_on_lock`,
    or nothing. A file system without locks is no reason: a warning says that nothing protects the folder."""
    if rank() != 0:
        yield ""
        return
    path = folder / RUN_LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        yield f"train.output_dir={folder} cannot be used: {path} cannot be opened ({error.strerror}); choose another"
        return
    with file:
        yield _lock(file, folder)


def agree_on_lock(refusal: str) -> None:
    """Raises ConfigError on every process, if the main one was refused the lock. Collective."""
    said = [refusal]
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise ConfigError(said[0])


def _lock(file: TextIO, folder: Path) -> str:
    """Locks the open file and writes down who holds it; else why not."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX has both mean that it is held
        return (
            f"train.output_dir={folder} is in use by another run, {_holder(file)}: wait until it has ended, end it, or "
            f"choose another train.output_dir; if that machine is gone for good, remove {file.name}"
        )
    except OSError as error:  # NFS without its lock service, Lustre mounted without `flock`
        logger.warning(
            "train.output_dir=%s is on a file system without locks (%s): nothing keeps a second run from writing "
            "checkpoints and metrics there at the same time",
            folder,
            error.strerror,
        )
        return ""
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    file.flush()
    os.fsync(file.fileno())  # so that other machines read it
    return ""


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        said = json.load(file)
        return f"process {said['pid']} on {said['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not yet written
        return "a process that is just starting"
