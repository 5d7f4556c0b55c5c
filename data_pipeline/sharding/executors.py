"""One function over many tasks, in this process, in many, or on a Ray cluster: the same results in any order.

    run = EXECUTORS["processes"]
    for result in run(write_task, jobs, workers=8): ...

Functions, tasks and results travel between processes, so all are picklable; a task is worth seconds or more.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import torch

from data_pipeline.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """Yields the result of every task as it comes. Raises what a task raises, after which no task is running any
    more; DataError if a worker was killed or the executor cannot start."""

    def __call__(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int
    ) -> Iterator[Result]: ...


def run_here(function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int = 1) -> Iterator[Result]:
    """In this process, one after the other."""
    return map(function, tasks)


def run_processes(function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int) -> Iterator[Result]:
    """In up to `workers` processes of this machine, each on one core. They end with this process, however it ends."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from run_here(function, tasks)
        return
    strangers = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_become_worker)
    try:
        for future in as_completed([pool.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, most often for want of memory: run the same command again, with fewer "
            "--workers; it goes on from what is finished"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - strangers:
            process.kill()
        pool.shutdown(cancel_futures=True)


def run_ray(function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int) -> Iterator[Result]:
    """On the Ray cluster at RAY_ADDRESS, on all of its cores; without one on `workers` cores of this machine.

    A task whose machine is lost runs again on another.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise DataError("--executor ray needs Ray: pip install 'glmv-train[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
    try:
        remote: Any = ray.remote(num_cpus=1, max_retries=3)(_on_one_core)
        shared = ray.put(function)
        waiting = list(reversed(tasks))
        running: list[Any] = []
        at_once = 2 * int(ray.cluster_resources().get("CPU", workers))  # the next task of a core is there when it ends
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(remote.remote(shared, waiting.pop()))
            finished, running = ray.wait(running)
            yield from ray.get(finished)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise DataError(f"Ray failed ({error}): run the same command again; it goes on from what is done") from error
    finally:
        if ours:
            ray.shutdown()


EXECUTORS: dict[str, Executor] = {"here": run_here, "processes": run_processes, "ray": run_ray}


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def _on_one_core(function: Callable[[Task], Result], task: Task) -> Result:
    _take_one_core()
    return function(task)


def _become_worker() -> None:
    """Once in every process of the pool."""
    _take_one_core()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends workers without a stack trace each
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()  # returns when the parent is gone, killed or not
    os._exit(1)


def _take_one_core() -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
