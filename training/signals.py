"""Requests to stop: SIGTERM or SIGUSR1 to any process of the run, or a file `stop` in the run folder.

A request is noted where it arrives. Before every step all processes take the same decision in one small collective, so
that they save the same step. A process that waits for lost storage cannot take part in it; the watchdog's thread tells
it to wait no longer. The process that got the signal may be waiting for that one in a collective, where Python runs no
handlers: so Python's C handler writes the signal to a socket too, which any thread may read.

Before the processes have joined, a signal has its usual effect: nothing can be lost.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from training.metrics import logger, writes_to

STOP_FILE = "stop"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_BY_FILE = 1 << 40  # in the agreement, where a signal is its number times _RANKS plus the rank
_RANKS = 1 << 24
_UNNAMED = 1  # in the agreement, below all others: the request has reached another process
_MANY = 4096  # bytes, one for each signal

os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))  # the signals of a child are its own


class StopRequests:
    """The requests to stop that have reached this process.

    Args:
        folder: the run folder, in which the main process looks for the file.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / STOP_FILE
        self._first_signal = 0
        self._signals: socket.socket | None = None
        self._file_was_seen = False
        self._answers: list[Callable[[], None]] = []
        self._is_answered = False

    @contextmanager
    def listening(self) -> Iterator[StopRequests]:
        """Note signals instead of ending, as long as this lasts. Later signals change nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._signals, sender = socket.socketpair()
        with self._signals, sender:
            self._signals.setblocking(False)
            sender.setblocking(False)
            before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
            wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            try:
                yield self
            finally:
                signal.set_wakeup_fd(wakeup)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._first_signal = self._first_signal or number
        self.answer()

    def received(self) -> int:
        """Return the number of the first signal, 0 if there was none. In any thread: the main one may be busy."""
        if not self._first_signal and self._signals is not None:
            with suppress(OSError):  # nothing to read, or closed
                if stops := [number for number in self._signals.recv(_MANY) if number in STOP_SIGNALS]:
                    self._first_signal = stops[0]
        return self._first_signal

    def on_request(self, answer: Callable[[], None]) -> None:
        """Have `answer` called when this process learns of a request: in a signal handler, or in another thread."""
        self._answers.append(answer)
        if self._is_answered:
            answer()

    def answer(self) -> None:
        """Call what waits for a request, and from now on whatever comes to wait for one."""
        self._is_answered = True
        for answer in self._answers:
            answer()

    def is_made(self) -> bool:
        """Return whether a request has reached this process. Costs the main process a look for the file."""
        if dist.get_rank() == 0 and not self._file_was_seen:
            with suppress(OSError):  # of storage that fails now; the main thread looks too
                self._file_was_seen = self.file.exists()
        return self.received() != 0 or self._file_was_seen

    @property
    def is_known(self) -> bool:
        """Whether this process has learned of a request, its own or another's. Costs nothing."""
        return self._is_answered

    def forget_old_file(self) -> None:
        """Remove a `stop` that an earlier run did not see. On the main process.

        A restart by torchrun obeys it: the run is the same.
        """
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and self.file.exists():
            self.remove_file()
            logger.warning("%s is older than this run: it is removed, and the run does not stop", self.file)

    def remove_file(self) -> None:
        """Remove the file, so that the next start does not stop."""
        with writes_to(self.file):
            self.file.unlink(missing_ok=True)

    def agree(self) -> str:
        """Return who asked the run to stop, the same on every process; empty: nobody. Collective."""
        request = self._highest()
        if request == _UNNAMED:
            # The process that got the signal was waiting in the agreement already, for one that waited for storage.
            request = self._highest()
        if request == _BY_FILE:
            return f"the file {self.file}"
        if request == _UNNAMED:
            return "a request"
        return f"{signal.Signals(request // _RANKS).name} on rank {request % _RANKS}" if request else ""

    def _highest(self) -> int:
        """Return the highest of the processes' requests. Collective."""
        rank = dist.get_rank()
        signalled = self.received()
        own = signalled * _RANKS + rank if signalled else int(self._is_answered) * _UNNAMED
        if rank == 0 and (self._file_was_seen or self.file.exists()):
            own = _BY_FILE
        highest = torch.tensor(own, device=torch.cuda.current_device())
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)
