"""Workers that die while they read: where they were, and what is rejected because of it.

A hostile file can crash a library, which ends its process. The kernel kills processes when memory runs out. Each task
keeps a note of its position, one line that costs two microseconds per draft:

    out/.build/task-00007.reading      "3 -1": reading the task's unit 3;  "3 41": measuring draft 41 of that unit

When a worker dies, the build reports it, the other tasks continue, and the task is tried once more after them. If its
worker dies again at the same position *in the same run of the command*, that position is rejected as
`crashed_reader`: the draft if it was being measured both times, else the whole unit. Then the task runs again without
it.

Deaths are counted in the memory of the command alone. So a build that is killed as a whole and started again rejects
nothing because of that, however often; neither does one kill of one worker. A file that always crashes its reader is
always rejected, before or after a restart, so the shards are the same. A worker that received SIGKILL, which the kernel
sends when memory runs out, gets its second try with no other worker beside it (executors.py).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.sharding.tasks import Task

READING = -1  # the draft number of a position where the reader itself runs

logger = logging.getLogger(__name__)


class ReadingPosition(NamedTuple):
    """Where a task is."""

    unit: int  # number in the task
    draft: int  # number in the unit; READING while the unit is read


@dataclass(frozen=True)
class Crash:
    """A position that is rejected because workers died there."""

    position: ReadingPosition  # draft READING: the whole unit
    how: str  # what the worker died of


class ReadingNote:
    """The position of a task, on disk for the process that finds its worker dead.

    What is written to a file outlives the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed by remove

    def at(self, position: ReadingPosition) -> None:
        """Write down where the task is now."""
        os.pwrite(self._file.fileno(), b"%9d %9d\n" % position, 0)

    def remove(self) -> None:
        """Remove the note of a task that is finished."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def take_position(note: Path) -> ReadingPosition | None:
    """Return the position in a note and remove the note. None if the task had not reached its first unit."""
    try:
        unit, draft = note.read_bytes().split()
        return ReadingPosition(int(unit), int(draft))
    except (FileNotFoundError, ValueError):
        return None
    finally:
        note.unlink(missing_ok=True)


class Deaths:
    """The deaths of workers in one run of a build, which decide what is rejected.

    Attributes:
        given_up: messages by task number, for tasks whose workers die where no unit is being read.
    """

    def __init__(self) -> None:
        self.given_up: dict[int, str] = {}
        self._unsettled: dict[int, list[ReadingPosition | None]] = {}  # by task: deaths that rejected nothing yet

    def record(self, task: Task, position: ReadingPosition | None, how: str) -> Crash | None:
        """Record a death, and return what it rejects. None: try the task again as it was."""
        before = self._unsettled.setdefault(task.number, [])
        twice = [earlier for earlier in before if (earlier and earlier.unit) == (position and position.unit)]
        where = f"task {task.number}, {_describe(task, position)}"
        if not twice:
            before.append(position)
            logger.warning("%s: a worker died (%s); the task is tried once more", where, how)
            return None
        if position is None:
            self.given_up[task.number] = f"{where}: workers died twice ({how})"
            return None
        before[:] = [earlier for earlier in before if earlier not in twice]
        logger.warning("%s: a worker died again (%s); rejected as crashed_reader", where, how)
        return Crash(position if position in twice else ReadingPosition(position.unit, READING), how)


def _describe(task: Task, position: ReadingPosition | None) -> str:
    if position is None:
        return "outside its units"
    _, unit = task.units[position.unit]
    span = f" from {unit.start} to {unit.stop}" if unit.stop else ""
    return f"{unit.path}{span}" + ("" if position.draft == READING else f", sample {position.draft} of it")
