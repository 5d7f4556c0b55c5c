"""Groups of real processes under gloo, which run many test cases, each with a time limit."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Processes:
    """A context manager of `size` processes that form one torch.distributed group.

    Args:
        size: How many.
        packages: Folders of packages that the processes find before the installed ones.
    """

    def __init__(self, size: int, packages: Sequence[Path] = ()) -> None:
        self.size = size
        self.packages = [str(folder) for folder in packages]
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="glmv-gloo-")
        store = f"{self._folder.name}/store"
        self._pipes, self._processes = [], []
        sys.path[:0] = self.packages  # a new process takes over the path
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, there), daemon=False)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        del sys.path[: len(self.packages)]

    def run(self, function: Callable[..., Any], *, timeout: float = 120, **arguments: Any) -> list[Any]:
        """Call a module-level function on every process and return the results in rank order.

        Raises:
            AssertionError: A process failed (with its traceback) or did not answer in time. The group is then started
                again for the next case.
        """
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(timeout):
                    self._restart()
                    raise AssertionError(f"{function.__name__}: rank {rank} gave no answer in {timeout} s")
                succeeded, value = pipe.recv()
            except EOFError:
                self._restart()
                raise AssertionError(f"{function.__name__}: rank {rank} died") from None
            if not succeeded:
                self._restart()
                raise AssertionError(f"{function.__name__} on rank {rank}:\n{value}")
            answers.append(value)
        return answers

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    forget_uses = reuse_groups()
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = (True, getattr(importlib.import_module(module), name)(**arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        forget_uses()
    os._exit(0)  # the groups' threads would take seconds to end


def reuse_groups() -> Callable[[], None]:
    """Make cases reuse the groups of earlier cases: the n-th group of the same ranks is created once.

    A layout creates dozens of groups. torch never ends all their threads, which wake up a hundred times a second.

    Returns:
        A function to call between cases.
    """
    import torch.distributed as dist

    true_new_group, true_destroy = dist.new_group, dist.destroy_process_group
    made: dict[tuple[Any, ...], Any] = {}
    uses: Counter[tuple[Any, ...]] = Counter()

    def new_group(ranks: Sequence[int] | None = None, **options: Any) -> Any:
        kind = (tuple(ranks or ()), options.get("backend"), options.get("use_local_synchronization"))
        use = (*kind, uses[kind])
        uses[kind] += 1
        if use not in made:
            made[use] = true_new_group(ranks, **options)
        return made[use]

    def destroy_process_group(group: Any = None) -> None:
        if group is None:  # the world and all its groups
            made.clear()
        if group not in made.values():
            true_destroy(group)

    distributed: Any = dist
    distributed.new_group, distributed.destroy_process_group = new_group, destroy_process_group
    return uses.clear
