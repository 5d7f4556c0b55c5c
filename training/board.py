"""What the processes of a run tell each other beside their collectives, which stand still when one of them does.

It is the store through which torchrun's processes met. Each process writes a beat under its rank, and the first one
that finds a reason why the run cannot continue writes it down as the end, once, for all.

    glmv/ID/3       {"beat": 17, "time": 1760000000.0, "rank": 3, "host": ..., "pid": ..., "step": 12, "phase": "step"}
    glmv/ID/end     {"kind": "hang", "rank": 0, "text": "no progress for 120 s ..."}
    glmv/ID/stop    whether any process was asked to stop
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from training.stacks import is_alive, process_status

HANG, GONE, ERROR = "hang", "gone", "error"
SILENT_BEATS = 5  # beats without a new sign after which a process is taken to be silent
_ANSWER = timedelta(seconds=20)  # of the store


@dataclass
class Beat:
    """The last sign of life of a process."""

    rank: int
    host: str
    pid: int
    started: str  # when, as Linux counts; a later process may get the same number
    beat: int = 0
    time: float = 0.0
    step: int = 0
    phase: str = ""
    seconds: float = 0.0  # in this phase
    has_left: bool = False  # at the end of the run

    @property
    def name(self) -> str:
        """Name the process for a message."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Board:
    """The beats of all processes and the end of the run. Made on all processes together; then each uses it alone.

    The beating thread has its own connection: one that it shared would be busy while the main thread waits.
    """

    def __init__(self) -> None:
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        store: dist.Store = dist.HashStore()
        if self.size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=_ANSWER, wait_for_workers=False)
        self._store = dist.PrefixStore(f"glmv/{name[0]}", store)
        status = process_status(os.getpid()) or {"started": ""}
        self.own = Beat(self.rank, socket.gethostname(), os.getpid(), status["started"])
        if self.rank == 0:
            self._store.set("end", "")
            self._store.set("stop", "")
        self.beat(step=0, phase="start", seconds=0.0)
        dist.barrier()

    def beat(self, **changes: Any) -> None:
        """Give a sign of life, with what has changed."""
        vars(self.own).update(changes, beat=self.own.beat + 1, time=time.time())
        self._store.set(str(self.rank), json.dumps(asdict(self.own)))

    def end(self) -> dict[str, Any]:
        """Return why the run ends; empty as long as it does not."""
        return _parse(self._store.get("end"))

    def announce_end(self, kind: str, text: str) -> dict[str, Any]:
        """Write down why the run ends, unless that is written. Returns what is."""
        mine = json.dumps({"kind": kind, "rank": self.rank, "text": text})
        return _parse(self._store.compare_set("end", "", mine))

    def announce_stop(self) -> None:
        """Write down that this process was asked to stop."""
        self._store.set("stop", "yes")

    def stop_is_announced(self) -> bool:
        """Return whether any process was asked to stop."""
        return bool(self._store.get("stop"))

    def beats(self) -> list[Beat]:
        """Return the last sign of life of every process."""
        return [Beat(**_parse(self._store.get(str(rank)))) for rank in range(self.size)]

    def silent(self, interval: float) -> list[Beat]:
        """Return the processes that are gone or give no sign. Takes SILENT_BEATS intervals where it has to watch them.

        Args:
            interval: seconds between beats.
        """
        if gone := self.gone():
            return gone
        before = self.beats()
        for _ in range(SILENT_BEATS):
            time.sleep(interval)
            self.beat()  # the others are watching too
        after = self.beats()
        return [new for old, new in zip(before, after, strict=True) if old.beat == new.beat and not new.has_left]

    def gone(self) -> list[Beat]:
        """Return the processes of this machine that have ended without leaving the run."""
        mine = [b for b in self.beats() if b.host == self.own.host and b.rank != self.rank and not b.has_left]
        return [beat for beat in mine if not is_alive(beat.pid, beat.started)]


def _parse(content: bytes) -> dict[str, Any]:
    return dict(json.loads(content)) if content else {}
