"""Data workers: processes that die with their run, hand over packs or say why not, and leave a note of their place.

torch's DataLoader starts them, gives out the work and keeps the order. What it leaves open is mended here:

    a run that is killed       its workers die with it
    a full /dev/shm            is an error, and not a run that waits for ever
    a worker that is killed    was at a sample, which is named: perhaps one that takes all memory, or crashes a library
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import signal
import time
from typing import Any

import torch
from torch.utils.data import get_worker_info

from data_pipeline.encoding.batch import Batch
from data_pipeline.errors import DataError
from data_pipeline.loading.malloc import keep_freed_memory

_PR_SET_PDEATHSIG = 1  # of Linux' sys/prctl.h
_NOTE_BYTES = 512

# How a dead worker shows where it has a pack ready that has not been fetched: nobody answers.
NO_ANSWER = (ConnectionError, EOFError, FileNotFoundError)


def begin_worker(parent: int, _worker: int) -> None:
    """What a worker does first; `parent` is the training process."""
    keep_freed_memory()
    die_with(parent)


def die_with(parent: int) -> None:
    """Has Linux kill this worker when the training process dies (or only the thread that has started the worker). By
    itself it would wait for ever if that is killed while the worker is sending a pack, and hold its memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def shared(batch: Any) -> Batch | DataError:
    """A pack where the training process sees it. torch would put it there as it sends the pack, in a thread of the
    worker whose errors nobody hears of; an error that is raised would travel with its stack trace."""
    try:
        return batch.with_tensors(torch.Tensor.share_memory_)
    except RuntimeError as error:
        return DataError(
            f"a data worker has no room in /dev/shm for a pack of {batch.nbytes / 1e6:.1f} MB ({error}): make it "
            "larger (docker run --shm-size), or lower data.prefetch or data.num_workers"
        )


def private(batch: Batch | DataError) -> Batch:
    """A pack in memory of this process alone. What workers send lies in shared memory, with an open file for every
    tensor: the hundreds of packs of a large step would be more than a process may have."""
    if isinstance(batch, DataError):
        raise batch
    return batch.with_tensors(torch.clone) if batch.input_ids.is_shared() else batch


class WorkerNotes:
    """Which sample every worker is at. What is written stays when a worker dies: a few bytes of memory that they share
    with the training process."""

    def __init__(self, workers: int):
        self._memory = mmap.mmap(-1, _NOTE_BYTES * max(workers, 1))

    def write(self, sample_id: str) -> None:
        """What this process, a worker, is at from now on; an empty text between two packs."""
        worker = get_worker_info()
        start = _NOTE_BYTES * worker.id if worker else 0
        note = f"{os.getpid()} {sample_id}".encode()[:_NOTE_BYTES]
        self._memory[start : start + _NOTE_BYTES] = note.ljust(_NOTE_BYTES, b"\0")

    def of_the_dead(self) -> list[str]:
        """What the workers were at that are no longer there; waits a moment for one that is about to go."""
        notes = (self._memory[start : start + _NOTE_BYTES] for start in range(0, len(self._memory), _NOTE_BYTES))
        places = [note.rstrip(b"\0").decode(errors="replace").partition(" ") for note in notes]
        for _ in range(50):
            alive = {str(process.pid) for process in multiprocessing.active_children()}
            if dead := [sample_id for pid, _, sample_id in places if sample_id and pid not in alive]:
                return dead
            time.sleep(0.02)
        return []
