"""Let all processes fail together, where one of them found a problem."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from model.errors import CheckpointError


def raise_everywhere(problem: str | None) -> None:
    """Raise on every process if any of them has a problem. Collective.

    Raises:
        CheckpointError: the problem of the first process that has one.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), None):
        raise CheckpointError(found)


def on_main_process(action: Callable[[], object]) -> None:
    """Run `action` on the main process, rank 0, and wait for it. Collective.

    Raises:
        CheckpointError: on every process, if `action` failed with an OSError or a CheckpointError.
    """
    problem = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except CheckpointError as error:
            problem = str(error)
    raise_everywhere(problem)
