"""Ends a run in which a process hangs or is gone, instead of letting the others wait for it.

A thread of each process gives a sign of life every second and looks at two things: has this process made progress, and
has another process written down an end of the run. A process without progress for `health.hang_seconds` writes down a
hang; then every process that can writes its stacks, and all end. Training is synchronous: one process that hangs stops
all others within a step, so that each of them can notice, also where the one that hangs cannot. It also tells processes
that wait for data of a request to stop that has reached another one.

    training.board      how the processes tell each other
    training.stacks     RUN/stacks/rank_NNN.txt
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from training.board import ERROR, GONE, HANG, SILENT_BEATS, Beat, Board
from training.health import HealthConfig
from training.metrics import writes_to
from training.signals import StopRequests
from training.stacks import STACKS, StackFile, dump_other, process_status

# Phases that end early where the run is asked to stop: a process may wait for storage, or draw and score for long.
ENDING_EARLY = ("data", "validating", "rollout", "reward")
CLOSING = "closing"  # the phase in which a run that ends closes its files
BEAT_SECONDS = 1.0
RANKS_PER_SECOND = 500  # more processes than that beat more slowly: one store serves them all
LEAVE_SECONDS = 20.0  # for a process that ends by itself, with its files closed
EXIT_HANG, EXIT_GONE = 70, 71


class Mark(NamedTuple):
    """What the main thread is doing."""

    since: float  # time.monotonic()
    step: int
    phase: str
    limit: float  # seconds that it may take


class Watchdog:
    """The beating thread of this process. Made on all processes together.

    Args:
        config: when to give up.
        folder: the run folder.
        requests: the requests to stop that have reached this process. torchrun sends a signal to the survivors when a
            process of theirs has died; they must not wait for it in a collective then.
    """

    def __init__(self, config: HealthConfig, folder: Path, requests: StopRequests) -> None:
        self.config, self.folder, self._requests = config, folder, requests
        self.is_saving: Callable[[], bool] = lambda: False  # whether this process writes a checkpoint in the background
        self._stop_is_known = False
        self.board = Board()
        self.interval = max(BEAT_SECONDS, self.board.size / RANKS_PER_SECOND)
        with writes_to(folder / STACKS):
            self._stacks = StackFile(folder, self.board.rank) if config.hang_seconds else None
        self.mark(0, "loading", slow=True)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    # --- for the main thread ------------------------------------------------------------------------------------------

    def mark(self, step: int, phase: str, *, slow: bool = False) -> None:
        """Say that there is progress, and what comes next. Costs less than a microsecond.

        Args:
            step: number of the step.
            phase: what comes next, for messages.
            slow: whether it may take `health.allowance_seconds` more.
        """
        self._mark = Mark(time.monotonic(), step, phase, self._limit(slow=slow))

    def _limit(self, *, slow: bool) -> float:
        hang, allowance = self.config.hang_seconds, self.config.allowance_seconds
        return hang + allowance * slow if hang else math.inf

    @property
    def step(self) -> int:
        """The step of the last mark."""
        return self._mark.step

    def close(self) -> None:
        """Leave: the others no longer expect signs of life."""
        self._closing.set()
        self._thread.join(timeout=LEAVE_SECONDS)
        with suppress(RuntimeError):  # torchrun has ended, and the store with it
            self.board.beat(has_left=True)
        if self._stacks is not None:
            self._stacks.close()

    def announce_error(self, text: str) -> bool:
        """Write down that this process ends with an error, and return whether it is the first one.

        The others do not wait for it then, and need not report that they lost it. A save in the background is still
        finished, here and there.
        """
        try:
            return bool(self.board.announce_end(ERROR, text)["rank"] == self.board.rank)
        except RuntimeError:
            return self.board.rank == 0

    def explain_loss(self) -> str:
        """Return why a collective failed: which process is gone. Empty if a process has told the user already."""
        exit_soon(EXIT_GONE, after=LEAVE_SECONDS + 2 * SILENT_BEATS * self.interval)
        try:
            for _ in range(10):  # the others may be about to write why, or about to die
                if self.board.end() or self.board.gone():
                    break
                time.sleep(self.interval / 5)
            if self.board.end():
                return ""
            text = _gone(self.board.silent(self.interval)) or "the connection to another process is lost"
            return text if self.board.announce_end(GONE, text)["rank"] == self.board.rank else ""
        except RuntimeError:
            return "the connection to the other processes and to torchrun is lost"

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.wait(self.interval):
            mark = self._mark
            seconds = time.monotonic() - mark.since
            if self._stacks is not None:
                self._stacks.dump_after(mark.limit + 2 * SILENT_BEATS * self.interval)
            try:
                self.board.beat(step=mark.step, phase=mark.phase, seconds=seconds)
                end = self.board.end()
                if not end and seconds > mark.limit:
                    end = self.board.announce_end(HANG, f"no progress for {mark.limit:.0f} s {_during(mark)}")
                self._spread_stop(mark)
                if not end and self._requests.received() and (gone := self.board.gone()):
                    end = self.board.announce_end(GONE, _gone(gone))
                    if end["rank"] == self.board.rank:
                        tell(end["text"])
            except RuntimeError:  # the store is gone, and torchrun with it, which ended or will end this process
                if seconds > mark.limit:
                    end = {"kind": HANG, "rank": self.board.rank, "text": "no progress, and the store is lost"}
                else:
                    continue
            if end:
                self._leave(end, mark)
                return

    def _spread_stop(self, mark: Mark) -> None:
        """Tell the others of a request to stop, or answer theirs, where this process is in one of these phases."""
        if self._stop_is_known:
            return
        if self._requests.is_made():
            self._stop_is_known = True
            self.board.announce_stop()
        elif mark.phase in ENDING_EARLY and self.board.stop_is_announced():
            self._stop_is_known = True
        if self._stop_is_known:
            self._requests.answer()

    def _leave(self, end: dict[str, Any], mark: Mark) -> None:
        """End this process because the run ends."""
        if end["kind"] == HANG:
            try:
                self._report_hang(end, mark)
            finally:
                os._exit(EXIT_HANG)
        if end["kind"] == ERROR:
            self._let_work_end()
        # The main thread usually gets an error from its collective and leaves by itself, with its files closed.
        if not self._closing.wait(LEAVE_SECONDS / 2):
            os._exit(EXIT_GONE)

    def _let_work_end(self) -> None:
        """Wait for the save in the background, or for the main thread that closes files, as long as these may take."""
        until = time.monotonic() + self._limit(slow=True)
        while (self.is_saving() or self._mark.phase == CLOSING) and time.monotonic() < until:
            if self._closing.wait(BEAT_SECONDS / 5):
                return

    def _report_hang(self, end: dict[str, Any], mark: Mark) -> None:
        """Write all stacks, and on the process that wrote down the hang, the message."""
        board, folder = self.board, self.folder / STACKS
        if self._stacks is not None:
            self._stacks.dump(f"{board.own.name}: {end['text']}; this process: {_during(mark)}")
        silent: list[Beat] = []
        with suppress(RuntimeError):
            silent = board.silent(self.interval)
        lines = [f"{beat.name} gave no sign for {time.time() - beat.time:.0f} s {_during(beat)}" for beat in silent]
        if end["rank"] == board.rank:
            cause = "; ".join(lines) or "all processes give signs of life: their stacks say where they wait"
            tell(f"{end['text']}: {cause}. The stacks are in {folder}; the run resumes from its newest checkpoint")
        here = [beat for beat in silent if beat.host == board.own.host]
        if here and board.rank == min(b.rank for b in board.beats() if b.host == board.own.host and b not in here):
            for beat, line in zip(silent, lines, strict=True):
                if beat in here:
                    dump_other(self.folder, beat.rank, line, vars(beat))
                    _kill(beat)


# --- helpers ----------------------------------------------------------------------------------------------------------


def tell(text: str) -> None:
    """Print an error that is nobody's alone."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def exit_soon(code: int, after: float = LEAVE_SECONDS) -> None:
    """End this process in a while, if it has not ended by then: without the others its teardown may hang."""
    timer = threading.Timer(after, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _during(mark: Mark | Beat) -> str:
    return f"at step {mark.step} ({mark.phase})"


def _gone(beats: list[Beat]) -> str:
    """Describe processes that are gone or silent."""
    return "; ".join(
        f"{beat.name} is gone: it was killed, or crashed, {_during(beat)}; the run resumes from its newest checkpoint"
        for beat in beats
    )


def _kill(beat: Beat) -> None:
    """Kill a silent process of this machine: torchrun would wait half a minute for it before a restart."""
    status = process_status(beat.pid)
    if status is not None and status["started"] == beat.started:
        os.kill(beat.pid, signal.SIGKILL)
