"""One function over many tasks, in this process, in many, or on a Ray cluster: the same results in any order.

    run = EXECUTORS["processes"]
    for result in run(write_task, jobs, workers=8): ...

Functions, tasks and results travel between processes, so all are picklable; a task is worth seconds or more. str(task)
names it in messages.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar, cast

import pyarrow as pa
import torch

from data_pipeline.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


MEND = (
    "SIGKILL mostly means that memory ran out: run the same command again, with fewer --workers; it goes on from what "
    "is finished. Any other signal is a crash of a library: if it comes again, take that file out"
)


def stop_at(task: object, how: str) -> Any:
    """What is done about a worker that died, unless something else is known."""
    raise DataError(f"a worker process died ({how}) while it was on {task}. {MEND}")


class Executor(Protocol):
    """Yields the result of every task as it comes. Raises what a task raises, after which no task is running any more;
    DataError if the executor cannot start.

    died: asked for what to do instead when the worker of a task died, (task, how it died) -> a task, which is done
    after all others, or None. stop_at raises DataError naming the task.
    """

    def __call__(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        *,
        workers: int,
        died: Callable[[Task, str], Task | None] = stop_at,
    ) -> Iterator[Result]: ...


def run_here(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int = 1,
    died: Callable[[Task, str], Task | None] = stop_at,
) -> Iterator[Result]:
    """In this process, one after the other: it dies with what crashes it."""
    return map(function, tasks)


def run_processes(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    died: Callable[[Task, str], Task | None] = stop_at,
) -> Iterator[Result]:
    """In up to `workers` processes of this machine, each on one core. They end with this process, however it ends.

    What was killed (SIGKILL, as when memory runs out) is tried again when nothing else is running.
    """
    context = multiprocessing.get_context("spawn")
    waiting, alone = deque(tasks), deque[Task]()
    idle: list[_Worker] = []
    busy: dict[Connection, _Worker] = {}

    def begin(task: Task) -> None:
        worker = idle.pop() if idle else _Worker(context, function)
        busy[worker.connection] = worker
        worker.begin(task)

    try:
        idle += [_Worker(context, function) for _ in range(min(workers, len(tasks)))]  # they start at the same time
        most = len(idle)
        while waiting or alone or busy:
            while waiting and len(busy) < most:
                begin(waiting.popleft())
            if alone and not busy:
                begin(alone.popleft())
            for connection in wait(list(busy)):
                worker = busy[cast(Connection, connection)]
                try:
                    result = worker.result()
                except _WorkerDied:
                    code = busy.pop(worker.connection).end(patience=10)
                    again = died(worker.task, _death(code))
                    if again is not None:
                        (alone if code == -signal.SIGKILL else waiting).append(again)
                else:
                    idle.append(busy.pop(worker.connection))
                    yield result
    finally:
        for worker in [*idle, *busy.values()]:
            worker.end()


class _WorkerDied(Exception):
    pass


class _Worker:
    """A process that does one task after the other."""

    def __init__(self, context: Any, function: Callable[[Any], Any]):
        self.connection, theirs = context.Pipe()
        self.task: Any = None
        self._process = context.Process(target=_work, args=(theirs, function))
        self._process.start()
        theirs.close()  # so that the connection ends with the process

    def begin(self, task: Any) -> None:
        self.task = task
        with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, which result() will tell
            self.connection.send(task)

    def result(self) -> Any:
        """Raises what the task raised, and _WorkerDied."""
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionResetError) as ended:
            raise _WorkerDied from ended
        if error is not None:
            raise error
        return result

    def end(self, patience: float = 0) -> int:
        """Kills it unless it ends by itself within so many seconds; how it ended: a negative signal or exit status."""
        self._process.join(patience)
        self._process.kill()
        self._process.join()
        self.connection.close()
        return int(self._process.exitcode)


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    _become_worker()
    while True:
        task = connection.recv()
        answer: tuple[Any, Exception | None]
        try:
            answer = (function(task), None)
        except Exception as error:
            error.add_note(traceback.format_exc())  # what is raised in the other process has no stack of its own
            answer = (None, error)
        connection.send(answer)


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def run_ray(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    died: Callable[[Task, str], Task | None] = stop_at,
) -> Iterator[Result]:
    """On the Ray cluster at RAY_ADDRESS, on all of its cores; without one on `workers` cores of this machine.

    A task whose machine is lost runs again on another. How a worker died is not told by Ray.
    """
    try:
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
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
        remote: Any = ray.remote(num_cpus=1, max_retries=0)(_on_one_core)
        shared = ray.put(function)
        waiting = deque(tasks)
        running: dict[Any, Task] = {}
        at_once = 2 * int(ray.cluster_resources().get("CPU", workers))  # the next task of a core is there when it ends
        while waiting or running:
            while waiting and len(running) < at_once:
                task = waiting.popleft()
                running[remote.remote(shared, task)] = task
            [finished], _ = ray.wait(list(running))
            task = running.pop(finished)
            try:
                result = ray.get(finished)
            except NodeDiedError:
                waiting.append(task)
            except (WorkerCrashedError, OutOfMemoryError) as error:
                again = died(task, "want of memory" if isinstance(error, OutOfMemoryError) else "a Ray worker")
                if again is not None:
                    waiting.append(again)
            else:
                yield result
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
    """At the start of every process."""
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
