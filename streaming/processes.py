"""The processes of a conversion: they take one portion after another, and end with their parent.

They are forked, before any thread exists: a new interpreter would take seconds and the memory of its libraries again.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from common.malloc import keep_freed_memory
from model.errors import ConversionError
from streaming.limits import BLOCKS, Limits, tree_bytes
from streaming.portion import Report

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.1
ALLOWANCE = 1.1  # above the limit of memory, for what is in use for a moment


class Killed(ConversionError):
    """A process was killed from outside. What is complete stays, and the same command resumes."""


class Crew:
    """Processes that write portions. Use it as a context, and call `is_working` until it is false."""

    def __init__(self, write: Callable[[int, Report], None], portions: Sequence[int], limits: Limits) -> None:
        self.limits = limits
        self._write, self._portions = write, list(portions)
        self._context: Any = multiprocessing.get_context("fork")
        self._next, self._bytes = self._context.Value("q", 0), self._context.Value("q", 0)
        self._errors = self._context.SimpleQueue()
        count = min(limits.processes, len(self._portions))
        self._processes = [self._context.Process(target=self._work, daemon=True) for _ in range(count)]

    def __enter__(self) -> Crew:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def bytes_done(self) -> int:
        """Return the bytes that were written so far."""
        return int(self._bytes.value)

    def is_working(self) -> bool:
        """Wait for a moment, and return whether a process still works.

        Raises:
            ConversionError: The processes use more memory than they may, or one was killed.
            Exception: What was raised in a process.
        """
        time.sleep(POLL_SECONDS)
        is_working = any(process.exitcode is None for process in self._processes)  # before its errors are looked at
        used = tree_bytes([os.getpid(), *(process.pid or 0 for process in self._processes)])
        if used > self.limits.max_memory * ALLOWANCE:
            raise ConversionError(
                f"the conversion uses {used / 2**20:,.0f} MiB, more than --max-memory allows: give more, or fewer "
                "--processes"
            )
        if not self._errors.empty():
            raise self._errors.get()
        for process in self._processes:
            if process.exitcode not in (None, 0):
                raise Killed(f"a process of the conversion {_end_of(process.exitcode)}; the same command resumes it")
        return is_working

    def _work(self) -> None:
        """Write portions until none is left. Runs in each process."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        keep_freed_memory(BLOCKS * self.limits.block_bytes)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent decides
        torch.set_num_threads(1)
        torch.serialization.set_crc32_options(False)  # the manifest has better checksums
        try:
            while (number := self._take()) is not None:
                self._write(number, self._report)
        except Exception as error:
            self._errors.put(error)

    def _take(self) -> int | None:
        with self._next.get_lock():
            taken = self._next.value
            self._next.value += 1
        return self._portions[taken] if taken < len(self._portions) else None

    def _report(self, nbytes: int) -> None:
        with self._bytes.get_lock():
            self._bytes.value += nbytes


def _end_of(exitcode: int) -> str:
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}, perhaps because the machine was out of memory"
    return f"ended with status {exitcode}"
