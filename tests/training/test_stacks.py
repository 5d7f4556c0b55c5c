"""Stacks are written also where no Python code runs any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT
from training.stacks import StackFile, is_alive, process_status

pytestmark = pytest.mark.fast

HOLDS_THE_LOCK = """
import ctypes, sys
from pathlib import Path
from training.stacks import StackFile

def hold_python_lock():
    ctypes.PyDLL(None).sleep(60)  # PyDLL, unlike CDLL, does not give up the interpreter's lock

StackFile(Path(sys.argv[1]), rank=7).dump_after(0.2)
hold_python_lock()
"""


@pytest.mark.timeout(50)
def test_timer_writes_the_stack_of_a_thread_that_never_gives_up_the_lock(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK, tmp_path], cwd=ROOT)
    assert done.returncode != 0
    assert "in hold_python_lock" in (tmp_path / "stacks" / "rank_007.txt").read_text()


def test_file_without_stacks_is_removed(tmp_path: Path) -> None:
    file = StackFile(tmp_path, rank=0)
    file.dump_after(60)
    file.close()
    assert list(tmp_path.iterdir()) == []
    file = StackFile(tmp_path, rank=0)
    file.dump("a reason")
    file.close()
    assert "a reason\n" in (tmp_path / "stacks" / "rank_000.txt").read_text()


def test_process_is_gone_once_it_has_ended_and_while_nobody_has_asked_for_its_exit_code() -> None:
    process = subprocess.Popen(["sleep", "60"])
    status = process_status(process.pid)
    assert status is not None
    assert is_alive(process.pid, status["started"])
    assert not is_alive(process.pid, "1")  # another process had this number
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().split(") ")[1][0] != "Z":
        pass
    assert not is_alive(process.pid, status["started"])
    process.wait()
    assert process_status(process.pid) is None
