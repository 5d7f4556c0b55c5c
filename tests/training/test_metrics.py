"""The records of a run folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from training.metrics import RunLog, cut_back
from training.run_errors import RunFolderError
from training.run_lock import run_lock
from training.step import StepReport

pytestmark = pytest.mark.fast

REPORT = StepReport(
    loss=1.0, grad_norm=1.0, lr=1.0, tokens=8, padding_fraction=0.0, samples=1, images=0, patches=0, quarantined=0
)


def write_until_full(folder: Path, answers: Connection) -> None:
    """Write steps in a process whose files may have 2 kB, then take the lock of the folder when they may have none."""
    os.dup2(os.open(folder.parent / "stderr", os.O_CREAT | os.O_WRONLY), 2)
    log = RunLog(folder, resumed_at=0, steps=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    try:
        for step in range(1, 100):
            log.step(step, REPORT, seconds=1.0, measured={})
    except RunFolderError as error:
        log.close()
        answers.send(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 2048))
    with run_lock(folder) as refusal:
        answers.send(refusal)
    try:
        RunLog(folder, resumed_at=0, steps=1000)
    except RunFolderError as error:
        answers.send(str(error))


def test_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    answers, process_end = fork.Pipe()
    process = fork.Process(target=write_until_full, args=(tmp_path / "run", process_end))
    process.start()
    process_end.close()
    message, refusal, message_at_start = answers.recv(), answers.recv(), answers.recv()
    process.join()
    assert message == (
        f"{tmp_path}/run/metrics.jsonl cannot be written (File too large): free some space or fix its file system, and "
        "start the run again; it resumes from its newest checkpoint"
    )
    assert refusal == ""  # so that the next start can free space
    assert message_at_start.startswith(f"{tmp_path}/run cannot be written (File too large): free some space")
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_records_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    cut_back(file, 2)
    assert not file.exists()
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    cut_back(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_metrics_of_a_run_without_checkpoint_are_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
        RunLog(tmp_path, resumed_at=0, steps=3).close()
        assert (tmp_path / f"metrics.{number}.jsonl").read_text() == f'{{"step": {number}}}\n'
        assert (tmp_path / "metrics.jsonl").read_text() == ""
