"""Export the checkpoints of a run as they are committed, while it runs.

    OUT/step_0000100/    a Hugging Face folder for each checkpoint, under a temporary name until it is whole
    OUT/follow.json      the run, the options, and the checksum of each exported checkpoint's manifest
    OUT/follow.lock      held by the one process that follows into this folder

The run is only read: its lock is not taken, and it need not run. What is in OUT says what is done, so that the same
command continues after any end.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import xxhash

from common.files import write_json
from common.storage import StorageError
from model.checkpoint import STEP_FOLDER, UNFINISHED, read_train_state, step_of
from model.checkpoint_manifest import MANIFEST
from model.errors import CheckpointError, ConfigError, ConversionError, WeightsError
from training.run_state import EXIT_CODES, read_state

JOURNAL, LOCK = "follow.json", "follow.lock"
STORAGE = "storage fails"  # in place of a manifest: what failed so is tried again
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# What may be wrong with one checkpoint, or happen to it while it is read. Errors of OUT are others.
OF_ONE_CHECKPOINT = (CheckpointError, ConfigError, WeightsError, StorageError, OSError)


class FollowError(ValueError):
    """A run cannot be followed. The message names the folder or the option and says how to fix it."""


class Stopped(BaseException):
    """This process was asked to stop. No `except Exception` may end this on its way."""


class Follower:
    """Exports the checkpoints of one run into one folder."""

    def __init__(
        self,
        run: Path,
        out: Path,
        *,
        export: Callable[[Path, Path], None],
        options: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Open the journal.

        Args:
            run: The run's folder.
            out: Folder of the exports, which exists.
            export: Exports a checkpoint into a folder that it makes, whole or not at all.
            options: Options of `export`, which all exports in `out` share.
            say: Shows a line.

        Raises:
            FollowError: `out` has exports of another run, or with other options.
        """
        self.run, self.out, self.export, self.say = run, out, export, say
        self.failed: dict[str, str] = {}  # manifests of checkpoints that cannot be exported, by step folder
        self._said: set[str] = set()
        self._manifests: dict[str, tuple[tuple[int, int, int], str]] = {}
        self._journal = _read_journal(out, {"run": str(run.resolve()), "options": dict(options)})

    def follow(self, poll_seconds: float) -> None:
        """Export until the run has ended and all its checkpoints are exported.

        Raises:
            FollowError: The run trains adapters alone.
        """
        self._remove_unfinished()
        while True:
            ended = read_state(self.run)  # before its checkpoints: the last one is saved before a run ends
            for checkpoint in committed(self.run):
                self._take(checkpoint)
            if ended.get("state") in EXIT_CODES:
                reason = f" ({ended['reason']})" if ended.get("reason") else ""
                self.say(f"the run is {ended['state']} at step {ended.get('step')}{reason}")
                return
            time.sleep(poll_seconds)

    def _take(self, checkpoint: Path) -> None:
        """Export a checkpoint, unless that is done or cannot be done."""
        name, target = checkpoint.name, self.out / checkpoint.name
        manifest = self._manifest(checkpoint)
        if target.is_dir() and any(target.iterdir()):
            self._note(name, manifest)
            return
        if name in self.failed and self.failed[name] == manifest:
            return
        began = time.perf_counter()
        try:
            if (checkpoint / "train_state.json").is_file() and read_train_state(checkpoint).base:
                raise FollowError(
                    f"{self.run} trains adapters alone (LoRA), of which no whole model can be exported: use "
                    "`python -m tools.convert export-lora` or `merge`"
                )
            self.export(checkpoint, target)
        except (*OF_ONE_CHECKPOINT, ConversionError) as error:
            if not checkpoint.is_dir():
                self.say(f"skipped {name}: it was removed (checkpoint.keep_last) before it was exported")
            elif isinstance(error, ConversionError):
                raise  # of `out`, or a process was killed
            else:
                if name not in self.failed:
                    self.say(f"cannot export {name}: {error}")
                self.failed[name] = STORAGE if isinstance(error, StorageError) else manifest
            return
        self.failed.pop(name, None)
        self._note(name, manifest)
        self.say(f"exported {name} in {time.perf_counter() - began:.1f} s")

    def _note(self, name: str, manifest: str) -> None:
        """Write down what an export was made of; say so if the run has saved this step again since."""
        steps = self._journal["steps"]
        if name not in steps:
            steps[name] = manifest
            write_json(self.out / JOURNAL, self._journal)
        elif manifest and steps[name] != manifest and name not in self._said:
            self._said.add(name)
            self.say(
                f"the run has saved {name} again since it was exported, with other content: remove {self.out / name} "
                f"and its line in {self.out / JOURNAL} to export it again"
            )

    def _manifest(self, checkpoint: Path) -> str:
        """Return the checksum of a checkpoint's manifest; an empty string where there is none, or not any more."""
        file = checkpoint / MANIFEST
        try:
            status = file.stat()
            form = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._manifests.get(checkpoint.name, ((), ""))[0] != form:
                self._manifests[checkpoint.name] = (form, xxhash.xxh3_64_hexdigest(file.read_bytes()))
        except OSError:
            return ""
        return self._manifests[checkpoint.name][1]

    def _remove_unfinished(self) -> None:
        """Remove what a process that was killed left of checkpoints that are gone; others are exported again."""
        for unfinished in self.out.glob(f"{UNFINISHED}step_*"):
            if not (self.run / "checkpoints" / unfinished.name.removeprefix(UNFINISHED)).is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)


def follow(
    run: Path,
    out: Path,
    *,
    export: Callable[[Path, Path], None],
    options: Mapping[str, Any],
    poll_seconds: float,
    say: Callable[[str], None],
) -> bool:
    """Export the checkpoints of a run until it has ended, and return whether all could be exported.

    Args:
        run: The run's folder.
        out: Folder of the exports.
        export: Exports a checkpoint into a folder that it makes, whole or not at all.
        options: Options of `export`.
        poll_seconds: How long to wait before looking for new checkpoints.
        say: Shows a line.

    Raises:
        FollowError: The run cannot be followed.
        Stopped: SIGINT or SIGTERM came. Nothing half-written is left.
        ConversionError: `out` cannot be written, or a process was killed.
    """
    if poll_seconds <= 0:
        raise FollowError(f"--poll-seconds {poll_seconds:g}: give more than 0")
    if not run.is_dir():
        raise FollowError(f"--follow {run} does not exist: give the folder of a run (train.output_dir)")
    if (run / "state").is_dir():
        raise FollowError(f"--follow {run} is one checkpoint: give the folder of its run, or use --checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out), _stopping():
        follower = Follower(run, out, export=export, options=options, say=say)
        follower.follow(poll_seconds)
    return not follower.failed


def committed(run: Path) -> list[Path]:
    """Return the step folders of a run, in the order of their steps. Others have other names until they are whole."""
    checkpoints = run / "checkpoints"
    found = [path for path in checkpoints.iterdir() if STEP_FOLDER.fullmatch(path.name)] if checkpoints.is_dir() else []
    return sorted(found, key=step_of)


def _read_journal(out: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return the journal, or a new one.

    Raises:
        FollowError: It is of another run, of other options, or damaged.
    """
    file = out / JOURNAL
    if not file.is_file():
        foreign = [path.name for path in out.iterdir() if path.name != LOCK]
        if foreign:
            raise FollowError(f"{out} has files ({foreign[0]}) but no {JOURNAL}: choose another --out, or empty it")
        write_json(file, {**expected, "steps": {}})
    try:
        journal = json.loads(file.read_text(encoding="utf-8"))
        different = [key for key in expected if journal[key] != expected[key]]
        if not isinstance(journal["steps"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise FollowError(f"{file} is damaged: choose another --out") from None
    if different:
        key = different[0]
        raise FollowError(
            f"{out} has exports with {key} {journal[key]}, and this command has {expected[key]}: choose another --out"
        )
    return dict(journal)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the lock of the folder of exports.

    Raises:
        FollowError: Another process holds it.
    """
    with (out / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FollowError(f"another process exports into {out}: end it, or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def _stopping() -> Iterator[None]:
    """Raise Stopped wherever this process is when it is asked to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # once is enough: what is half-written is being removed
        raise Stopped(f"stopped by {signal.Signals(number).name}; the same command continues")

    before = {each: signal.signal(each, stop) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
