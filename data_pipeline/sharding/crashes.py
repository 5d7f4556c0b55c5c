"""Workers that die while they read: where they were, and what is to blame.

A library that a hostile file crashes takes its process with it, and so does the kernel when memory runs out. Each task
keeps a note of its place, a line that costs two microseconds a draft:

    out/.build/task-00007.reading      "3 -1": reading the task's unit 3;  "3 41": measuring what it gave as draft 41

When a worker dies, the build says so, the other tasks go on, and the task is tried once more after them. If its worker
dies again at the same place *while the same command runs*, what is there is set aside as `crashed_reader`: the draft
if it was being measured both times, else the whole unit. Then the task is done again without it.

Deaths are counted in the memory of the command alone. So a whole build that is killed and started again sets nothing
aside for it, however often; one kill of one worker neither; and a file that always crashes its reader always goes,
before or after a restart, so that the shards are the same. A worker that was sent SIGKILL, as the kernel does for want
of memory, has its second try with no other worker beside it (executors.py).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.sharding.tasks import Task

READING = -1  # the draft of a place where the reader itself is at work

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """A unit of a task and a draft of it, by number; or READING."""

    unit: int
    draft: int


@dataclass(frozen=True)
class Crash:
    """What is set aside. draft: READING for the whole unit; how: by what the worker died."""

    place: Place
    how: str


class ReadingNote:
    """The place of a task, for whoever finds its worker dead. What is written to a file outlives the process."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed by remove

    def at(self, place: Place) -> None:
        os.pwrite(self._file.fileno(), b"%9d %9d\n" % place, 0)

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def take_place(note: Path) -> Place | None:
    """What a note says, which is then removed; None if the task had not come to its first unit."""
    try:
        unit, draft = note.read_bytes().split()
        return Place(int(unit), int(draft))
    except (FileNotFoundError, ValueError):
        return None
    finally:
        note.unlink(missing_ok=True)


class Deaths:
    """The deaths of one run of a build, which decide what is set aside.

    given_up: by number, what is said of tasks whose workers die where no unit is to blame."""

    def __init__(self) -> None:
        self.given_up: dict[int, str] = {}
        self._places: dict[int, list[Place | None]] = {}  # by task: deaths that nothing was set aside for yet

    def blame(self, task: Task, place: Place | None, how: str) -> Crash | None:
        """What the death of a task's worker sets aside; None if the task is to be tried as it was."""
        before = self._places.setdefault(task.number, [])
        twice = [earlier for earlier in before if (earlier and earlier.unit) == (place and place.unit)]
        where = f"task {task.number}, {_name(task, place)}"
        if not twice:
            before.append(place)
            logger.warning("%s: a worker died (%s); the task is tried once more", where, how)
            return None
        if place is None:
            self.given_up[task.number] = f"{where}: workers died twice ({how})"
            return None
        before[:] = [earlier for earlier in before if earlier not in twice]
        logger.warning("%s: a worker died again (%s); it is set aside as crashed_reader", where, how)
        return Crash(place if place in twice else Place(place.unit, READING), how)


def _name(task: Task, place: Place | None) -> str:
    if place is None:
        return "at no unit"
    _, unit = task.pieces[place.unit]
    span = f" from {unit.start} to {unit.stop}" if unit.stop else ""
    return f"{unit.path}{span}" + ("" if place.draft == READING else f", sample {place.draft} of it")
