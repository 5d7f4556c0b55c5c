"""Stacks of processes that do not move: RUN/stacks/rank_NNN.txt.

A process writes its own, from another thread, whatever its main thread is doing. If the main thread holds Python's
lock, no Python code runs any more: then a timer in C does it. The stack of a stopped process comes from py-spy, where
that is installed; without it the file says in which state the kernel has the process.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, TextIO

import torch

STACKS = "stacks"


def stack_file(folder: Path, rank: int) -> Path:
    """Return the file of a rank's stacks."""
    return folder / STACKS / f"rank_{rank:03d}.txt"


class StackFile:
    """The file of this process's stacks: open before it is needed, and removed at the end if it is empty.

    Args:
        folder: the run folder.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = stack_file(folder, rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def dump_after(self, seconds: float) -> None:
        """Let a timer write the stacks and end the process after this time, unless this is called again."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def dump(self, title: str) -> None:
        """Write the stacks of all threads now, and what NCCL was doing."""
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        os.fsync(self._file.fileno())
        trace = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if trace is not None and (content := trace()):
            self.path.with_suffix(".nccl.json").write_bytes(content if isinstance(content, bytes) else content.encode())

    def close(self) -> None:
        """Stop the timer, and remove the file if nothing was written."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        try:
            if not self.path.stat().st_size:
                self.path.unlink()
            self.path.parent.rmdir()  # fails while other files are there
        except OSError:
            pass


# --- other processes of this machine ----------------------------------------------------------------------------------


def process_status(pid: int) -> dict[str, str] | None:
    """Return the state letter and start time that Linux knows of a process; None where it does not exist any more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name of the program, in parentheses, may hold spaces
    return {"state": fields[0], "started": fields[19]}


def is_alive(pid: int, started: str) -> bool:
    """Return whether the process that started then still exists, be it stopped."""
    status = process_status(pid)
    return status is not None and status["started"] == started and status["state"] not in ("Z", "X")


def dump_other(folder: Path, rank: int, title: str, process: dict[str, Any]) -> None:
    """Write what can be known about a silent process of this machine into the file of its stacks."""
    pid = process["pid"]
    status = process_status(pid)
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}"]
    if status is None:
        lines.append(f"process {pid} does not exist any more")
    else:
        lines.append(f"process {pid} is in state {status['state']} (T: stopped, D: waits for a device, Z: has ended)")
        lines.append(_py_spy(pid))
    with stack_file(folder, rank).open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _py_spy(pid: int) -> str:
    program = shutil.which("py-spy")
    if program is None:
        return "its stack is unknown: install py-spy to have it here next time"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy failed: {error}"
    return done.stdout or done.stderr
