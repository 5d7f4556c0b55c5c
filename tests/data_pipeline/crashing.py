"""An input that kills its process: as it is read, or by the drafts that it gives."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.inputs.draft import Draft, Rejected, Unit

UNITS, DRAFTS = 12, 3


def segfault() -> None:
    faulthandler.disable()  # its report is long, and the crash expected
    ctypes.string_at(0)


class CrashingImages(tuple):
    """Images that crash the process when they are read, as a decoder with a bug does."""

    def __iter__(self) -> Iterator:
        segfault()
        return super().__iter__()


@dataclass(frozen=True)
class Crashing:
    """UNITS units of DRAFTS texts each, some of which crash or are killed."""

    paths: tuple[str, ...] = ()
    folder: str = ""  # for a mark of every unit of `killed_once` that was killed
    crashes: tuple[int, ...] = ()  # units whose reader crashes after its first draft
    crashing_drafts: tuple[tuple[int, int], ...] = ()  # (unit, draft) whose images crash
    killed: tuple[int, ...] = ()  # units that are killed with SIGKILL every time
    killed_once: tuple[int, ...] = ()  # units that are killed the first time only

    def units(self) -> Sequence[Unit]:
        return [Unit(f"unit-{number}", number, bytes=1000) for number in range(UNITS)]

    def given(self, unit: Unit) -> Mapping[str, int]:
        return {"texts": DRAFTS}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        for number in range(DRAFTS):
            record = {"domain": "text", "text": f"Text {number} of {unit.start}. " * 9}
            draft = Draft(record, origin=f"{unit.path}:{number}", items={"texts": 1})
            yield replace(draft, images=CrashingImages()) if (unit.start, number) in self.crashing_drafts else draft
            if unit.start in self.crashes:
                segfault()
            if unit.start in self.killed or (unit.start in self.killed_once and self._first_time(unit)):
                os.kill(os.getpid(), signal.SIGKILL)

    def _first_time(self, unit: Unit) -> bool:
        try:
            (Path(self.folder) / unit.path).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@dataclass(frozen=True)
class Harmless(Crashing):
    """The same input without the drafts that a build rejects."""

    def given(self, unit: Unit) -> Mapping[str, int]:
        return {"texts": sum(1 for _ in self.read(unit))}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        if unit.start not in (*self.crashes, *self.killed):
            drafts = Crashing().read(unit)
            yield from (
                draft for number, draft in enumerate(drafts) if (unit.start, number) not in self.crashing_drafts
            )


def crash_at(task: str) -> str:
    if task == "bad.tar":
        segfault()
    return task


def ray_build(records: str, out: str) -> None:
    """Build on a Ray cluster of its own, in a process that will be killed."""
    from data_pipeline.sharding.build import build_shards

    build_shards(sorted(Path(records).glob("*.jsonl")), out, shard_bytes=60_000, executor="ray", workers=2)
