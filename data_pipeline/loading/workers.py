"""Data workers: processes that die with their run, and either deliver a pack or say why they cannot.

torch's DataLoader starts them, distributes the work and keeps the order. This module handles what it does not:

    the run is killed       its workers die with it
    the job gets a signal    the workers continue until the training process ends them
    /dev/shm is full        an error, instead of a run that hangs
    a worker is killed      the error says which sample it was reading; the sample may have used up the memory or
                            crashed a library
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import torch
from torch.utils.data import get_worker_info

from common.malloc import keep_freed_memory
from data_pipeline.encoding.batch import Batch
from data_pipeline.errors import DataError

_PR_SET_PDEATHSIG = 1  # from Linux' sys/prctl.h
_NOTE_BYTES = 512
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# What the training process sees if a worker died after it had finished a pack, and before the pack was fetched.
WORKER_GONE = (ConnectionError, EOFError, FileNotFoundError)


def init_worker(parent: int, _worker: int) -> None:
    """Prepare a worker process. parent: process id of the training process."""
    keep_freed_memory()
    gc.enable()  # the training process, of which this is a fork, may collect at steps of its own choice
    _die_with(parent)
    _obey_only(parent)


def _die_with(parent: int) -> None:
    """Make Linux kill this worker when the training process dies, or the thread of it that started the worker.

    Otherwise, if the training process is killed while the worker sends a pack, the worker waits forever and keeps its
    memory.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _obey_only(parent: int) -> None:
    """End at a SIGTERM of the training process, and at no other; ignore SIGUSR1.

    A job scheduler sends its signals to all processes of a job. The training process saves a checkpoint then, and needs
    its workers until that step is done; they end with it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(_STOP_SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def to_shared_memory(batch: Any) -> Batch | DataError:
    """Move a pack to memory that the training process can read; return the error if /dev/shm is full.

    Otherwise torch would move it while sending, in a thread of the worker whose errors are lost. The error is returned
    because a raised one would arrive with its stack trace.
    """
    if isinstance(batch, DataError):
        return batch
    try:
        return batch.with_tensors(torch.Tensor.share_memory_)
    except RuntimeError as error:
        return DataError(
            f"a data worker has no space in /dev/shm for a pack of {batch.nbytes / 1e6:.1f} MB ({error}): make it "
            "larger (docker run --shm-size), or lower data.prefetch or data.num_workers"
        )


def to_private_memory(batch: Batch | DataError) -> Batch:
    """Copy a pack to memory of this process only; raise the error if it is one.

    A pack from a worker is in shared memory, with one open file per tensor. The hundreds of packs of a large step would
    exceed the number of files that a process may open.
    """
    if isinstance(batch, DataError):
        raise batch
    return batch.with_tensors(torch.clone) if batch.input_ids.is_shared() else batch


class WorkerNotes:
    """The sample that every worker is reading, in memory shared with the training process: it survives the worker."""

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, _NOTE_BYTES * max(workers, 1))

    def write(self, sample_id: str) -> None:
        """Note which sample this worker process is reading; "" between two packs."""
        worker = get_worker_info()
        start = _NOTE_BYTES * worker.id if worker else 0
        note = f"{os.getpid()} {sample_id}".encode()[:_NOTE_BYTES]
        self._memory[start : start + _NOTE_BYTES] = note.ljust(_NOTE_BYTES, b"\0")

    def samples_of_dead_workers(self) -> list[str]:
        """Return the samples that dead workers were reading. Waits up to a second for a worker that is dying."""
        blocks = (self._memory[start : start + _NOTE_BYTES] for start in range(0, len(self._memory), _NOTE_BYTES))
        notes = [block.rstrip(b"\0").decode(errors="replace").partition(" ") for block in blocks]
        for _ in range(50):
            alive = {str(process.pid) for process in multiprocessing.active_children()}
            if dead := [sample_id for pid, _, sample_id in notes if sample_id and pid not in alive]:
                return dead
            time.sleep(0.02)
        return []
