"""Run a conversion: portions in several processes, within the memory limit, resumed after a kill.

    OUT/../.unfinished_OUT/    becomes OUT when it is complete
        .portions/identity.json   what is converted, and how
        .portions/3.json          portion 3 is complete and on disk; what was written
        .portions/lock            held by the conversion that writes here

A conversion that was killed, or whose storage failed, is resumed by the same command. After another error nothing is
left.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.disk import free_space
from common.files import sync_folder, write_json
from common.storage import StorageError
from model.errors import ConversionError
from streaming.limits import Limits
from streaming.portion import Job
from streaming.processes import Crew, Killed
from streaming.progress import bytes_bar

UNFINISHED = ".unfinished_"
PORTIONS, IDENTITY, LOCK = ".portions", "identity.json", "lock"
LOCK_SECONDS = 10.0  # processes of a killed conversion end within this time


def convert(job: Job, out: Path, limits: Limits, what: str) -> None:
    """Write a folder, as the job says.

    Args:
        job: The conversion.
        out: Folder to make, which is empty or does not exist.
        limits: Memory and processes.
        what: Name of the work, for the progress bar.

    Raises:
        ConversionError: The folder cannot be written, or a process was killed.
    """
    folder = out.with_name(UNFINISHED + out.name)
    with _locked(folder, out):
        try:
            _convert(job, folder, out, limits, what)
        except (KeyboardInterrupt, Killed, StorageError):
            raise  # what is complete stays, and the same command resumes
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            cause = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise ConversionError(
                f"cannot write {out}: {cause} ({free_space(out)}); what was written of it is removed"
            ) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _convert(job: Job, folder: Path, out: Path, limits: Limits, what: str) -> None:
    done = _completed(folder, job)
    left = [number for number in range(len(job.portions)) if number not in done]
    _write_portions(job, folder, left, limits, what)
    results = [json.loads((folder / PORTIONS / f"{number}.json").read_text()) for number in range(len(job.portions))]
    job.finish(folder, results)
    _commit(folder, out)


def _write_portions(job: Job, folder: Path, left: list[int], limits: Limits, what: str) -> None:
    total = sum(portion.nbytes for portion in job.portions)
    skipped = total - sum(job.portions[number].nbytes for number in left)

    def write(number: int, report: Any) -> None:
        result = job.write(number, folder, report)
        write_json(folder / PORTIONS / f"{number}.json", result)

    with bytes_bar(what, total, skipped) as show, Crew(write, left, limits) as crew:
        while crew.is_working():
            show(skipped + crew.bytes_done())
        show(total)


def _completed(folder: Path, job: Job) -> set[int]:
    """Return the portions that an earlier call has completed; none if it converted something else."""
    identity = json.loads(json.dumps({**job.identity, "portions": len(job.portions)}))
    try:
        same = json.loads((folder / PORTIONS / IDENTITY).read_text()) == identity
    except (OSError, ValueError):
        same = False
    for temporary in folder.rglob("*.tmp"):  # of a file that was being written
        temporary.unlink()
    if same:
        return {int(path.stem) for path in (folder / PORTIONS).glob("[0-9]*.json")}
    for path in folder.iterdir():
        if path.name != PORTIONS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (folder / PORTIONS).glob("*.json*"):
        path.unlink()
    job.begin(folder)
    write_json(folder / PORTIONS / IDENTITY, identity)
    return set()


def _commit(folder: Path, out: Path) -> None:
    shutil.rmtree(folder / PORTIONS)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(inner)
    if out.exists():
        out.rmdir()  # it is empty
    folder.rename(out)
    sync_folder(out.parent)


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the lock of an unfinished folder. Its processes inherit it, so that it is free when the last has ended.

    Raises:
        ConversionError: Another conversion writes this folder.
    """
    try:
        (folder / PORTIONS).mkdir(parents=True, exist_ok=True)
        file = (folder / PORTIONS / LOCK).open("a")
    except OSError as error:
        raise ConversionError(f"cannot write {out}: {error.filename}: {error.strerror}") from error
    with file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConversionError(
                        f"another conversion is writing {out}: wait for it, or choose another --out"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks: nothing protects the folder
                break
        yield
