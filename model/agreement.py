"""Let all processes fail together, where one of them found a problem."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from common.storage import StorageError
from model.errors import CheckpointError


def raise_everywhere(problem: str | StorageError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every process if any of them has a problem. Collective.

    Args:
        problem: What is wrong on this process; None or empty where nothing is. A StorageError is raised as it is.
        group: All processes, where another thread uses the default group at the same time.

    Raises:
        CheckpointError: the problem of the first process that has one.
    """
    problems: list[str | StorageError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    if found := next(filter(None, problems), None):
        raise found if isinstance(found, StorageError) else CheckpointError(found)


def on_main_process(action: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `action` on the main process, rank 0, and wait for it. Collective.

    Args:
        action: What the main process does.
        group: All processes, where another thread uses the default group at the same time.

    Raises:
        CheckpointError: on every process, if `action` failed with an OSError or a CheckpointError.
        StorageError: on every process, if `action` failed with it.
    """
    problem: str | StorageError | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except CheckpointError as error:
            problem = str(error)
        except StorageError as error:
            problem = error
    raise_everywhere(problem, group)
