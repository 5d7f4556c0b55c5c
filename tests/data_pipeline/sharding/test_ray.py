"""Builds on Ray, with workers and whole clusters that are killed."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from data_pipeline.errors import DataError
from data_pipeline.sharding.executors import run_ray
from data_pipeline.sharding.writing import WORK
from tests.data_pipeline.crashing import Crashing, Harmless
from tests.data_pipeline.sharding.builds import build_of, built, contents, shards_of


@pytest.fixture(scope="module")
def ray_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder for Ray's sessions, with a short name because it holds sockets. No Ray process outlives the tests."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield folder
    left = [
        process for process in psutil.process_iter(["cmdline"]) if folder in " ".join(process.info["cmdline"] or [])
    ]
    _, alive = psutil.wait_procs(left, timeout=30)
    shutil.rmtree(folder)
    assert not alive


@pytest.fixture(scope="module")
def ray_cluster(ray_folder: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", ray_folder)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


def test_ray_writes_the_same_bytes_while_its_workers_are_killed(records, uninterrupted, tmp_path, ray_cluster):
    """Also: an error in a task is raised in this process."""
    killed: list[int] = []  # numbers of tasks
    ended = threading.Event()
    killer = threading.Thread(target=_kill_ray_workers, args=(killed, ended, tmp_path / WORK))
    killer.start()
    try:
        built(records, tmp_path, executor="ray", workers=2)
        with pytest.raises(DataError, match="the fix"):
            list(run_ray(_mistake, [1], workers=2))
    finally:
        ended.set()
        killer.join()
    assert killed
    assert contents(tmp_path) == uninterrupted


def _mistake(task: int) -> None:
    raise DataError("the fix")


def _kill_ray_workers(killed: list[int], ended: threading.Event, work: Path) -> None:
    """Send SIGKILL to three processes while they read, each for another task: a build gives up one that dies twice."""
    moments = random.Random(3)
    while len(killed) < 3 and not ended.wait(moments.uniform(0, 0.03)):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.cmdline()[:1] != ["ray::_on_one_core"]:
                    continue
                notes = [Path(file.path) for file in process.open_files() if Path(file.path).parent == work]
                tasks = {int(match[1]) for note in notes if (match := re.search(r"task-(\d+)", note.name))}
                if tasks and not tasks & {*killed}:
                    process.kill()
                    killed += tasks
                    break


def kill_rays(records: Path, out: Path, times: int, ahead: Sequence[int], ray_folder: str) -> Counter[str]:
    """Kill builds with all processes of their own Ray (driver, servers, workers), and count what they left.

    Each kill comes at a random moment after a number of tasks, chosen from `ahead`, is done.
    """
    moments = random.Random(7)
    left: Counter[str] = Counter()
    program = f"from tests.data_pipeline.crashing import ray_build; ray_build({str(records)!r}, {str(out)!r})"
    work = out / WORK
    while left["kills"] < times:
        goal = len(list(work.glob("task-*.json"))) + moments.choice(ahead)
        driver = psutil.Popen(
            [sys.executable, "-c", program],
            start_new_session=True,
            env={**os.environ, "RAY_TMPDIR": ray_folder},
        )
        while driver.poll() is None and not (work.is_dir() and len(list(work.glob("task-*.json"))) >= goal):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        if driver.poll() is None:
            family = [*driver.children(recursive=True), driver]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            _, alive = psutil.wait_procs(family, timeout=30)
            assert not alive
            left["kills"] += 1
            left["begun"] += any(path.is_dir() for path in work.glob("task-*"))
            left["done"] += any(work.glob("task-*.json"))
        else:  # it finished before the kill: start again
            assert driver.returncode == 0
            shutil.rmtree(out)
    return left


def test_ray_resumes_where_it_was_killed(records, uninterrupted, tmp_path, ray_folder, ray_cluster):
    out = tmp_path / "out"
    assert kill_rays(records, out, 1, [1], ray_folder)["done"]
    built(records, out, executor="ray", workers=2)
    assert contents(out) == uninterrupted


@pytest.mark.slow
def test_ray_killed_ten_times_gives_the_same_bytes(records, uninterrupted, tmp_path, ray_folder, ray_cluster):
    out = tmp_path / "out"
    left = kill_rays(records, out, 10, [0, 1, 1, 2], ray_folder)
    assert left["begun"]
    assert left["done"]
    built(records, out, executor="ray", workers=2)
    assert contents(out) == uninterrupted


def test_ray_rejects_the_same_samples(tmp_path, ray_cluster):
    given: dict[str, Any] = {"crashes": (6,), "crashing_drafts": ((3, 1),)}
    outcome = build_of(Crashing(**given), tmp_path / "out", executor="ray", workers=2)
    assert outcome.counts.rejected == {"crashed_reader": 2}
    build_of(Harmless(**given), tmp_path / "harmless")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "harmless")
