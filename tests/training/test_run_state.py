"""How a run has ended: state.json, and what a restart makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model.config import ConfigError
from tests.launch import ROOT
from training.distributed import check_processes, process_group
from training.run_state import end_restart_of_an_ended_run, note_refusal, note_start, read_state, write_state

pytestmark = pytest.mark.fast

HOLDS_THE_FOLDER = """
import sys
from pathlib import Path
from training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_run_that_cannot_start_again_has_failed_unless_another_one_uses_its_folder(tmp_path: Path) -> None:
    note_refusal(tmp_path, ValueError("a mistake"))
    assert list(tmp_path.iterdir()) == []  # there is no run here
    write_state(tmp_path, "stopped", step=3, steps=6, reason="by SIGUSR1 on rank 0")
    command = [sys.executable, "-c", HOLDS_THE_FOLDER, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    note_refusal(tmp_path, ValueError("a mistake"))
    assert read_state(tmp_path)["state"] == "stopped"
    other.communicate("")
    note_refusal(tmp_path, ValueError("a mistake"))
    assert read_state(tmp_path) == {"state": "failed", "step": 3, "steps": 6, "reason": "a mistake"}


@pytest.mark.parametrize(("state", "exit_code"), [("stopped", 75), ("failed", 2), ("complete", 0), ("running", None)])
def test_restart_by_torchrun_ends_where_the_run_had_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, exit_code: int | None
) -> None:
    write_state(tmp_path, state, step=3, steps=6, reason="by SIGTERM on rank 1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    end_restart_of_an_ended_run(tmp_path)  # the user's command: it resumes
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if exit_code is None:
        end_restart_of_an_ended_run(tmp_path)
        return
    with pytest.raises(SystemExit) as caught:
        end_restart_of_an_ended_run(tmp_path)
    assert caught.value.code == exit_code


def test_end_of_the_run_before_is_not_taken_for_that_of_a_run_that_crashes_while_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    note_start(tmp_path, steps=6)
    assert read_state(tmp_path) == {}  # as long as there was no step
    write_state(tmp_path, "stopped", step=3, steps=6, reason="by SIGTERM on rank 1")
    note_start(tmp_path, steps=9)
    assert read_state(tmp_path) == {"state": "running", "step": 3, "steps": 9, "reason": ""}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    end_restart_of_an_ended_run(tmp_path)


def test_rank_without_world_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="RANK is set and WORLD_SIZE not: start the run with torchrun, or unset RANK"):
        check_processes()
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="RANK is set and MASTER_ADDR not: start the run with"), process_group():
        pass
