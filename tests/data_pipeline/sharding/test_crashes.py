"""Workers that die: what is rejected, what is tried again, and what stops the build."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Unit
from data_pipeline.sharding import writing
from data_pipeline.sharding.crashes import READING, Deaths, ReadingPosition
from data_pipeline.sharding.executors import run_processes
from data_pipeline.sharding.tasks import Task
from data_pipeline.sharding.writing import WORK
from data_pipeline.shards.index import write_index
from tests.data_pipeline.crashing import Crashing, Harmless, crash_at
from tests.data_pipeline.sharding.builds import build_of, contents, shards_of


@pytest.mark.parametrize("workers", [1, 2])
def test_only_what_crashes_its_reader_is_rejected(tmp_path, forked, caplog, workers):
    """Real segmentation faults while reading and decoding; a worker that is killed once, and one that always is."""
    given: dict[str, Any] = {"crashes": (1, 6), "crashing_drafts": ((3, 1), (3, 2), (9, 0))}
    given |= {"killed": (10,), "killed_once": (4, 11), "folder": str(tmp_path)}
    outcome = build_of(Crashing(**given), tmp_path / "out", executor="processes", workers=workers)
    assert outcome.counts.rejected == {"crashed_reader": 6}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["origin"], line["detail"].split("(")[1].split(")")[0]) for line in rejected] == [
        ("unit-1", "SIGSEGV"),
        ("unit-3:1", "SIGSEGV"),
        ("unit-3:2", "SIGSEGV"),
        ("unit-6", "SIGSEGV"),
        ("unit-9:0", "SIGSEGV"),
        ("unit-10", "SIGKILL"),
    ]
    build_of(Harmless(**given), tmp_path / "harmless")
    assert outcome.tasks > 3
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "harmless")
    said = [record.getMessage() for record in caplog.records]
    assert sum("tried once more" in line for line in said) == 8
    assert "task 0, unit-1: a worker died (SIGSEGV); the task is tried once more" in said
    assert "task 1, unit-3, sample 1 of it: a worker died again (SIGSEGV); rejected as crashed_reader" in said


def test_workers_that_die_outside_units_stop_the_build_after_the_other_tasks(tmp_path, forked, monkeypatch):
    """A bug while a shard is closed rejects no file."""
    monkeypatch.setattr(writing, "write_index", _die_at_the_third_task)
    with pytest.raises(
        DataError, match=r"^task 2, outside its units: workers died twice \(SIGSEGV\)\. SIGKILL usually"
    ):
        build_of(Crashing(), tmp_path / "out", executor="processes", workers=2)
    done = sorted(path.name for path in (tmp_path / "out" / WORK).glob("task-*.json"))
    assert len(done) > 2
    assert "task-00002.json" not in done
    monkeypatch.undo()
    build_of(Crashing(), tmp_path / "out")
    build_of(Crashing(), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _die_at_the_third_task(tar: Path, *rest, **how) -> None:
    crash_at("bad.tar" if "-00002-" in tar.name else tar.name)
    write_index(tar, *rest, **how)


def test_death_of_a_worker_names_its_task(forked):
    with pytest.raises(
        DataError, match=r"a worker process died \(SIGSEGV\) while it worked on bad\.tar\. .*fewer --work"
    ):
        list(run_processes(crash_at, ["a.tar", "bad.tar", "b.tar"], workers=2))


def test_error_in_a_task_stops_all_workers(forked):
    """Also for EOFError, which is how the death of a worker is noticed."""
    before = set(multiprocessing.active_children())
    with pytest.raises(EOFError, match="of the task") as raised:
        list(run_processes(_end_of_file, [1, 2, 3], workers=2))
    assert "_end_of_file" in "".join(raised.value.__notes__)
    assert set(multiprocessing.active_children()) == before


def _end_of_file(task: int) -> None:
    raise EOFError("of the task")


@pytest.mark.fast
def test_second_death_at_a_position_rejects_it():
    task = Task(7, ((0, Unit("a.pdf", 0, 9)), (0, Unit("a.pdf", 9, 18))), 0)
    cases: list[tuple[list[ReadingPosition | None], ReadingPosition | None]] = [
        ([ReadingPosition(0, READING)], None),
        ([ReadingPosition(0, READING), ReadingPosition(1, READING)], None),
        (
            [ReadingPosition(0, READING), ReadingPosition(1, READING), ReadingPosition(0, READING)],
            ReadingPosition(0, READING),
        ),
        ([ReadingPosition(0, 5), ReadingPosition(0, 5)], ReadingPosition(0, 5)),
        ([ReadingPosition(0, 5), ReadingPosition(0, 6)], ReadingPosition(0, READING)),
        ([ReadingPosition(0, 5), ReadingPosition(0, READING)], ReadingPosition(0, READING)),
        ([ReadingPosition(0, 5), ReadingPosition(0, 5), ReadingPosition(0, 6)], None),
        (
            [ReadingPosition(0, 5), ReadingPosition(0, 5), ReadingPosition(0, 6), ReadingPosition(0, 6)],
            ReadingPosition(0, 6),
        ),
        ([None, ReadingPosition(0, 0)], None),
    ]
    for positions, wanted in cases:
        deaths = Deaths()
        crash = [deaths.record(task, position, "SIGSEGV") for position in positions][-1]
        assert (crash and crash.position) == wanted
        assert not deaths.given_up
    assert [deaths.record(task, None, "SIGSEGV") for _ in range(2)] == [None, None]
    assert deaths.given_up == {7: "task 7, outside its units: workers died twice (SIGSEGV)"}
