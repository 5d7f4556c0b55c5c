"""A process that compares LaTeX by sympy, each pair in a process of its own.

    python -m rewards.symbolic_server SECONDS BYTES

It reads a line of JSON [given, wanted] from stdin, and writes "same", "different", "unreadable", "time_limit" or
"memory_limit" as JSON to stdout. `rewards.workers` starts it. It ends when stdin does.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from common.readable import is_readable

_VIRTUAL, _RESIDENT = 0, 1  # columns of /proc/PID/statm
_LOOK_SECONDS = 0.02
_ROOM = 64 << 20


def serve(seconds: float, memory: int) -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a child: to free a gigabyte takes its time
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)  # what libraries print is no answer
    compare("\\frac{1}{2}x", "x/2")  # imports, and fills the caches that forks then share
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        given, wanted = json.loads(line)
        answers.write(json.dumps(in_own_process(given, wanted, seconds, memory)).encode() + b"\n")
        answers.flush()


def in_own_process(given: str, wanted: str, seconds: float, memory: int) -> str:
    """Compare in a fork, and kill it when its time is over."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _child(given, wanted, writing, memory, seconds)
    os.close(writing)
    try:
        said = _watched(child, reading, time.monotonic() + seconds, _pages("self", _RESIDENT) + memory)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.close(reading)
    return said or "memory_limit"  # it ended without an answer


def _watched(child: int, reading: int, end: float, memory: int) -> str:
    """Return what a child says, or the limit that it reaches first. math-verify hides a MemoryError, so we look."""
    while time.monotonic() < end:
        if is_readable(reading, _LOOK_SECONDS):
            return os.read(reading, 64).decode()
        try:
            if _pages(str(child), _RESIDENT) > memory:
                return "memory_limit"
        except OSError:  # it has ended
            return os.read(reading, 64).decode()
    return "time_limit"


def _child(given: str, wanted: str, writing: int, memory: int, seconds: float) -> None:
    """Write the outcome and end. It never returns."""
    said = "unreadable"
    try:
        limit = _pages("self", _VIRTUAL) + 2 * memory + _ROOM  # for what is allocated between two looks
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2, int(seconds) + 3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        said = compare(given, wanted)
    except MemoryError:
        said = "memory_limit"
    except BaseException:
        said = "unreadable"
    finally:
        os.write(writing, said.encode())
        os._exit(0)


def _pages(process: str, column: int) -> int:
    """Return the bytes of memory that a process has, by a column of its statm."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[column]) * resource.getpagesize()


def compare(given: str, wanted: str) -> str:
    """Compare two texts in LaTeX by math-verify: `same`, `different` or `unreadable`."""
    from math_verify import verify

    trees = [_parse(text) for text in (wanted, given)]
    if not all(trees):
        return "unreadable"
    return "same" if verify(*trees, timeout_seconds=None, strict=True) else "different"


def _parse(text: str) -> Sequence[Any]:
    """Return what math-verify reads in a text, without the text itself, which it adds."""
    from math_verify import LatexExtractionConfig, parse

    text = text.strip().strip("$")
    # LaTeX's grammar alone: the other one hands texts to sympy's parser, which evaluates them.
    found = parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=False)
    return [tree for tree in found if not isinstance(tree, str)]


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
