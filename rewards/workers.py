"""Processes that can be killed, for symbolic mathematics: some of it neither ends nor answers to a signal handler.

    caller ──pipe──> server (python -m rewards.symbolic_server) ──fork──> one process per comparison

A server is started once, with nothing of the caller's memory, and imports sympy. It forks a process per comparison,
which takes milliseconds, gives it a limit of memory, and kills it when its time is over: sympy need not be imported
again. A server that does not answer itself is killed and replaced. Servers start when they are needed first, or by
`start`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.readable import is_readable

SECONDS = 3.0  # for one comparison: an answer is scored within 5 on a busy machine too
MEMORY = 1 << 30  # bytes of memory that a comparison may have beside what the server has
_GRACE = 1.5  # seconds that a server may take beyond the limit before it is killed itself
_START_SECONDS = 60.0

Said = Literal["same", "different", "unreadable", "time_limit", "memory_limit"]
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Limits:
    """What one comparison may use."""

    seconds: float = SECONDS
    memory: int = MEMORY


class Workers:
    """Compares by symbolic mathematics, in processes of its own. Threads may share it.

    Args:
        count: How many comparisons run at once. Further ones wait for their turn, which their limit does not count.
        limits: What one comparison may use.
    """

    def __init__(self, count: int = 1, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._idle: queue.SimpleQueue[_Server | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._count = count
        self.killed = 0  # comparisons that a limit ended

    def compare(self, given: str, wanted: str) -> Said:
        """Compare an answer with a reference, both in LaTeX."""
        server = self._idle.get()
        try:
            if server is None or not server.alive:
                server = _Server(self._limits)
            said = server.ask(given, wanted)
            if said in ("time_limit", "memory_limit"):
                self.killed += 1
            return said
        finally:
            self._idle.put(self._replaced(server))

    def _replaced(self, server: _Server | None) -> _Server | None:
        """Return a server, or one in place of a server that was killed, which starts while others are asked."""
        if server is None or server.alive:
            return server
        try:
            return _Server(self._limits)
        except OSError:  # no process or file can be had now: the next comparison tries again
            return None

    def start(self) -> None:
        """Start the servers now, without waiting for them: each takes a second or two until it can compare."""
        for _ in range(self._count):
            server = self._idle.get()
            try:
                server = server or _Server(self._limits)
            finally:
                self._idle.put(server)

    def close(self) -> None:
        """End the servers. Comparisons after it start new ones."""
        for _ in range(self._count):
            server = self._idle.get()
            if server is not None:
                server.kill()
            self._idle.put(None)


class _Server:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        arguments = [str(limits.seconds), str(limits.memory)]
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rewards.symbolic_server", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self._rest = b""
        self._ready = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, given: str, wanted: str) -> Said:
        assert self._process.stdin is not None
        if not self._ready and self._line(_START_SECONDS) != b"ready":
            self.kill()
            raise RuntimeError("the server of symbolic mathematics does not start: is sympy or math-verify broken?")
        self._ready = True
        request = json.dumps([given, wanted]).encode() + b"\n"
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._line(self._limits.seconds + _GRACE)
        except OSError:
            line = None
        if line is None:
            self.kill()
            return "time_limit"
        said: Said = json.loads(line)
        return said

    def _line(self, seconds: float) -> bytes | None:
        """Return the next line that the server writes, or None if none comes in time."""
        assert self._process.stdout is not None
        descriptor, end = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready = is_readable(descriptor, end - time.monotonic())
            read = os.read(descriptor, 65536) if ready else b""
            if not read:
                return None
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not flushed has no reader
                    pipe.close()


_shared: Workers | None = None
_lock = threading.RLock()


def shared() -> Workers:
    """Return the workers that the verifiers of this process share."""
    with _lock:
        return _shared or configure(1)


def configure(count: int, limits: Limits | None = None) -> Workers:
    """Set how many comparisons of this process run at once, and their limits; ends what ran before."""
    global _shared
    with _lock:
        if _shared is not None:
            _shared.close()
        _shared = Workers(count, limits)
        return _shared


def _close() -> None:
    if _shared is not None:
        _shared.close()


def _forget() -> None:
    """Leave the servers to the process that started them: a fork must neither ask nor end them."""
    global _shared, _lock
    _shared, _lock = None, threading.RLock()


atexit.register(_close)
os.register_at_fork(after_in_child=_forget)
