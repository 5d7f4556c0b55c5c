"""Data workers: none is left behind, and one that dies or has no shared memory ends the run with one line."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import subprocess
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import DataError
from data_pipeline.plan.plan import PlanPosition
from tests.data_pipeline.loaders import loader, take


def test_closing_leaves_no_process_behind(data_config):
    packed = loader(replace(data_config, num_workers=2))
    packed.next_step()
    workers = worker_pids()
    packed.close()
    assert len(workers) == 2
    assert not any(alive(pid) for pid in workers)


def test_closing_leaves_no_process_behind_although_an_error_refers_to_it(own_shards):
    """A stack trace refers to what its functions had, for as long as the error is kept."""
    folder, config = own_shards
    packed = loader(replace(config, num_workers=2, retry_seconds=0.2))
    packed.next_step()
    workers = worker_pids()
    for path in folder.rglob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="is lost") as kept:
        take(packed, 50)
    packed.close()
    assert kept.value
    assert len(workers) == 2
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def worker_pids() -> list[int]:
    return [process.pid for process in psutil.Process().children() if process.name() == "pt_data_worker"]


@pytest.mark.timeout(60)
def test_killed_worker_is_an_error_and_not_a_hang(data_config):
    packed = loader(replace(data_config, num_workers=1))
    packed.next_step()
    os.kill(worker_pids()[0], signal.SIGKILL)
    time.sleep(0.5)  # the death itself must not raise an error here
    with pytest.raises(DataError, match=r"a data worker died .*\(.*run out of memory.*data.num_workers=0"):
        take(packed, 20)


@pytest.mark.timeout(60)
def test_workers_outlive_the_signals_of_a_job_scheduler_and_end_with_the_training_process(data_config):
    packed = loader(replace(data_config, num_workers=1))
    packed.next_step()
    [worker] = worker_pids()
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    assert len(take(packed, 5)) == 20
    assert worker_pids() == [worker]
    os.kill(worker, signal.SIGTERM)  # as torch does where a worker does not end by itself
    psutil.wait_procs([psutil.Process(worker)], timeout=5)
    assert not alive(worker)


@pytest.mark.timeout(60)
def test_full_shared_memory_is_an_error_and_not_a_hang(data_config):
    """A limit on file sizes acts like a small /dev/shm, which containers have by default."""
    packed = loader(replace(data_config, num_workers=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"no space in /dev/shm for a pack of .* MB \(.*--shm-size.*data\.prefetch"):
            take(packed, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(take(packed, 2)) == 8, "it continues where it was"
    packed.close()


def test_step_of_many_packs_does_not_keep_files_open(data_config):
    packed = loader(replace(data_config, num_workers=2), batch=64, seq_length=256)
    packed.next_step()
    few = len(os.listdir("/proc/self/fd"))
    held = [packed.next_step() for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) < few + 64
    packed.close()
    assert sum(map(len, held)) == 3 * 64


@pytest.mark.timeout(60)
def test_worker_that_dies_is_reported_with_its_sample(own_shards):
    """The worker is killed while it opens a shard: a lease makes the kernel stop it there and signal this process.

    The first pack, which this process reads itself, does not need that shard.
    """
    _, config = own_shards
    packed = loader(replace(config, num_workers=1), seq_length=128)
    [source] = packed.sources
    first, *later = (pack for step, _ in islice(packed.plan.steps(PlanPosition.start(1)), 32) for pack in step)
    needed, others = (
        {source.sample(piece.row).shard for pack in packs for piece in pack.pieces} for packs in ([first], later)
    )
    shard = Path(min(others - needed))

    def kill(*_: object) -> None:
        [worker] = worker_pids()
        os.kill(worker, signal.SIGKILL)

    before = signal.signal(signal.SIGIO, kill)
    descriptor = os.open(shard, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with pytest.raises(DataError, match=rf"a data worker died at {re.escape(shard.name)}/\d+-\d+ \("):
            take(packed, 32)
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)
