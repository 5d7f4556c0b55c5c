"""One run at a time in a run folder: its main process holds a lock on a file there.

    RUN/run.lock        {"host": "node-17", "pid": 4711}: the process that holds the lock, or held it last

The kernel frees the lock when the process ends, however it ends. The file stays, and means nothing without the lock.
It is a POSIX record lock, not flock(): the loader's forked workers would share a flock and keep it for seconds after a
run is killed. A record lock is lost if its process opens and closes the file again, which no code does.
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
from training.metrics import logger
from training.ranks import rank

RUN_LOCK = "run.lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[str]:
    """Hold the lock of a run folder, on the main process only.

    Yields:
        Why the lock could not be taken, for `agree_on_lock`; an empty string if it was. On a file system without locks
        it is empty too: a warning says that nothing protects the folder.
    """
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
    """Raise ConfigError on every process if the main process was refused the lock. Collective."""
    said = [refusal]
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise ConfigError(said[0])


def _lock(file: TextIO, folder: Path) -> str:
    """Lock the open file and write down who holds it. Return why that failed, or an empty string."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # in POSIX both mean that it is held
        return (
            f"train.output_dir={folder} is in use by another run, {_holder(file)}: wait until it has ended, end it, or "
            f"choose another train.output_dir; if that machine is gone for good, remove {file.name}"
        )
    except OSError as error:  # NFS without its lock service, Lustre mounted without `flock`
        logger.warning(
            "train.output_dir=%s is on a file system without locks (%s): nothing prevents a second run from writing "
            "checkpoints and metrics there at the same time",
            folder,
            error.strerror,
        )
        return ""
    try:
        file.truncate(0)
        os.write(file.fileno(), json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        os.fsync(file.fileno())  # other machines must be able to read it
    except OSError as error:  # the disk is full: the lock holds all the same
        logger.warning("%s cannot be written (%s)", file.name, error.strerror)
    return ""


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock but has not written yet
        return "a process that is just starting"
