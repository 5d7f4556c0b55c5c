"""The faults of the soak: each does to a run what clusters do, and says how that must end."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil

from tests.launch import finish, is_saving, metrics, process_of_rank

WAIT = 300.0  # seconds for anything that must happen


@dataclass
class Run:
    """A run on two ranks, to which faults happen."""

    folder: Path
    shards: Path  # its own copy
    launch: Callable[[], Popen[str]]
    launcher: Popen[str]
    rng: random.Random
    interval: int  # of checkpoints
    poison: Path
    outputs: dict[int, str] = field(default_factory=dict)  # of the launchers that have ended

    @property
    def step(self) -> int:
        """The last step that is written down."""
        return max((line["step"] for line in metrics(self.folder)), default=0)

    @property
    def latest(self) -> int:
        """The step that a restart would resume from."""
        for marker in ("latest", ".first_save"):
            file = self.folder / "checkpoints" / marker
            if file.exists() and (file.parent / file.read_text().strip()).is_dir():
                return int(file.read_text().removeprefix("step_"))
        return 0

    @property
    def saved(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(path for path in (self.folder / "checkpoints").glob("step_*") if path.suffix != ".damaged")

    @property
    def has_ended(self) -> bool:
        return self.launcher.poll() is not None

    def finish(self) -> str:
        """Wait until the run has ended, and return what it printed."""
        if self.launcher.pid not in self.outputs:
            self.outputs[self.launcher.pid] = finish(self.launcher, timeout=WAIT)
        return self.outputs[self.launcher.pid]

    def kill(self) -> None:
        """Kill all that is left of it."""
        if not self.has_ended:
            launcher = psutil.Process(self.launcher.pid)
            for process in (*launcher.children(recursive=True), launcher):
                process.kill()
            self.launcher.wait()

    def rank(self) -> psutil.Process:
        """Return the process of either rank."""
        return process_of_rank(self.launcher, self.rng.choice((0, 1)))

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False if the run ends before."""
        deadline = time.monotonic() + WAIT
        while not condition():
            if self.has_ended:
                return False
            assert time.monotonic() < deadline, f"nothing happened to {self.folder} in {WAIT} s"
            time.sleep(0.01)
        return True

    def wait_for_steps(self, number: int) -> bool:
        """Wait until this many steps are written down after those of now, and then for a random part of a step."""
        target = self.step + number
        arrived = self.wait(lambda: self.step >= target)
        time.sleep(self.rng.random() * 0.2)
        return arrived and not self.has_ended


@dataclass(frozen=True)
class Outcome:
    """How a fault must end."""

    ends: bool = True  # the run; it is started again then
    reason: str = ""  # a regular expression for the one error; empty: there is none
    lost: Sequence[int] = ()  # checkpoints that cannot be used any more
    undo: Callable[[], Any] = lambda: None  # what an operator does before the next start


Fault = Callable[[Run], Outcome]


IS_GONE = r"is gone|the connection to (another process|the other processes)"


def kill(run: Run) -> Outcome:
    run.rank().kill()
    return Outcome(reason=IS_GONE)


def kill_while_saving(run: Run) -> Outcome:
    """Kill -9 in an asynchronous save."""
    step = run.step // run.interval * run.interval + run.interval
    if not run.wait(lambda: is_saving(run.folder, step) or run.latest >= step):
        return Outcome(ends=False)
    return kill(run)


def terminate(run: Run) -> Outcome:
    run.rank().send_signal(signal.SIGTERM)
    return Outcome()


def warn_of_the_time_limit(run: Run) -> Outcome:
    """SIGUSR1, as SLURM sends it."""
    run.rank().send_signal(signal.SIGUSR1)
    return Outcome()


def suspend(run: Run) -> Outcome:
    run.rank().suspend()
    return Outcome(reason=r"gave no sign for \d+ s")


def fill_disk(run: Run) -> Outcome:
    """Leave room for nothing, or for a part of a checkpoint."""
    filler = run.folder / "filler"
    left = run.rng.choice((0, 1 << 20, 12 << 20))
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, shutil.disk_usage(run.folder).free - left))
    return Outcome(reason="No space left on device", undo=filler.unlink)


def damage_newest(run: Run) -> Outcome:
    """Kill the run and damage a file of its newest checkpoint."""
    if not run.wait(lambda: any(int(path.name.removeprefix("step_")) < run.latest for path in run.saved)):
        return Outcome(ends=False)
    run.rank().kill()
    run.finish()
    newest = run.folder / "checkpoints" / f"step_{run.latest:07d}"
    file = run.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    match run.rng.randrange(3):
        case 0:
            file.unlink()
        case 1:
            os.truncate(file, file.stat().st_size // 2)
        case _:
            content = bytearray(file.read_bytes())
            content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
            file.write_bytes(content)
    return Outcome(reason=IS_GONE, lost=[run.latest])


def lose_shard(run: Run) -> Outcome:
    """Delete a shard, which comes back while the run has it open, or after a start without it."""
    shard = run.rng.choice(sorted(run.shards.rglob("*.tar")))
    elsewhere = run.shards.parent / shard.name
    shard.rename(elsewhere)

    def give_back() -> None:
        elsewhere.rename(shard)

    if run.rng.random() < 0.3:
        time.sleep(run.rng.uniform(0.5, 2))
        give_back()
        return Outcome(ends=False)
    run.rank().kill()
    run.finish()
    run.launcher = run.launch()
    return Outcome(reason=re.escape(str(shard)), undo=give_back)


def poison_gradient(run: Run) -> Outcome:
    run.poison.touch()
    return Outcome(reason=r"the gradient norm is nan")


FAULTS: dict[str, Fault] = {
    "kill -9 of a rank": kill,
    "kill -9 of a rank in an asynchronous save": kill_while_saving,
    "SIGTERM to a rank": terminate,
    "SIGUSR1 to a rank": warn_of_the_time_limit,
    "SIGSTOP of a rank": suspend,
    "full disk": fill_disk,
    "newest checkpoint damaged": damage_newest,
    "shard deleted": lose_shard,
    "NaN in a gradient": poison_gradient,
}
