"""Run one function over many tasks: in this process, in many processes, or on a Ray cluster.

    run = EXECUTORS["processes"]
    for result in run(write_task, jobs, workers=8): ...

Results come in any order and are the same with every executor. Functions, tasks and results travel between processes,
so all must be picklable, and a task should take seconds or more. Messages name a task by str(task).
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
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar, cast

from data_pipeline.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

ADVICE = (
    "SIGKILL usually means out of memory: run the same command again with fewer --workers; it resumes from what is "
    "finished. Any other signal is a crash of a library: if it happens again, remove that file from the input"
)


def stop_at(task: object, how: str) -> Any:
    """Stop at a worker that died: what executors do unless they are told something else."""
    raise DataError(f"a worker process died ({how}) while it worked on {task}. {ADVICE}")


class Executor(Protocol):
    """Runs tasks and yields the result of each as it comes.

    Raises what a task raises; then no task runs any more. Raises DataError if the executor cannot start.
    """

    def __call__(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        *,
        workers: int,
        died: Callable[[Task, str], Task | None] = stop_at,
    ) -> Iterator[Result]:
        """Run `function` over `tasks`.

        Args:
            function: What to do with each task.
            tasks: All tasks.
            workers: The number of processes.
            died: Called with a task whose worker died, and with how it died. Returns the task to run instead, after
                all others, or None.
        """


def run_here(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int = 1,
    died: Callable[[Task, str], Task | None] = stop_at,
) -> Iterator[Result]:
    """Run tasks in this process, one after the other. A crash of a library ends this process too."""
    return map(function, tasks)


def run_processes(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    died: Callable[[Task, str], Task | None] = stop_at,
) -> Iterator[Result]:
    """Run tasks in up to `workers` processes of this machine, each on one core.

    The processes end with this process, however it ends. A task whose worker was killed (SIGKILL, as when memory runs
    out) is tried again when nothing else is running.
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
    """A process that runs one task after the other."""

    def __init__(self, context: Any, function: Callable[[Any], Any]) -> None:
        self.connection, theirs = context.Pipe()
        self.task: Any = None
        self._process = context.Process(target=_work, args=(theirs, function))
        self._process.start()
        theirs.close()  # so that the connection ends with the process

    def begin(self, task: Any) -> None:
        self.task = task
        with suppress(BrokenPipeError, ConnectionResetError):  # the process is dead; result() reports it
            self.connection.send(task)

    def result(self) -> Any:
        """Return the result of the task. Raises what the task raised, or _WorkerDied."""
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionResetError) as ended:
            raise _WorkerDied from ended
        if error is not None:
            raise error
        return result

    def end(self, patience: float = 0) -> int:
        """Kill the process unless it ends within `patience` seconds. Returns its exit status, or minus the signal."""
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
            error.add_note(traceback.format_exc())  # the exception loses its traceback on the way to the other process
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
    """Run tasks on all cores of the Ray cluster at RAY_ADDRESS, or on `workers` cores of this machine without one.

    A task whose machine is lost runs again on another. Ray does not say how a worker died.
    """
    try:
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise DataError("--executor ray needs Ray: pip install 'glmv-train[ray]'") from error
    try:
        with _ray_cluster(workers) as cores:
            yield from _run_on_ray(function, tasks, cores, died)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise DataError(f"Ray failed ({error}): run the same command again; it resumes from what is done") from error


@contextmanager
def _ray_cluster(workers: int) -> Iterator[int]:
    """Connect to a cluster or start one on this machine, and yield its number of cores."""
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
    try:
        yield int(ray.cluster_resources().get("CPU", workers))
    finally:
        if started_here:
            ray.shutdown()


def _run_on_ray(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    cores: int,
    died: Callable[[Task, str], Task | None],
) -> Iterator[Result]:
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    remote: Any = ray.remote(num_cpus=1, max_retries=0)(_on_one_core)
    shared = ray.put(function)
    waiting = deque(tasks)
    running: dict[Any, Task] = {}
    while waiting or running:
        while waiting and len(running) < 2 * cores:  # the next task of a core is there when its first one ends
            task = waiting.popleft()
            running[remote.remote(shared, task)] = task
        [finished], _ = ray.wait(list(running))
        task = running.pop(finished)
        try:
            result = ray.get(finished)
        except NodeDiedError:
            waiting.append(task)
        except (WorkerCrashedError, OutOfMemoryError) as error:
            again = died(task, "out of memory" if isinstance(error, OutOfMemoryError) else "a Ray worker")
            if again is not None:
                waiting.append(again)
        else:
            yield result


EXECUTORS: dict[str, Executor] = {"here": run_here, "processes": run_processes, "ray": run_ray}


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _on_one_core(function: Callable[[Task], Result], task: Task) -> Result:
    _take_one_core()
    return function(task)


def _become_worker() -> None:
    """Set up a worker process."""
    _take_one_core()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends workers without a stack trace each
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()  # returns when the parent is gone, killed or not
    os._exit(1)


def _take_one_core() -> None:
    import torch  # importing it takes a second, which commands without workers need not wait for

    torch.set_num_threads(1)
    import pyarrow as pa

    pa.set_cpu_count(1)
