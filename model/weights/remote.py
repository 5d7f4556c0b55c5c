"""Hugging Face folders behind a URL: weights are read by ranges where they are, the small files are copied.

    folder = hf_folder("s3://bucket/GLM-4.5V")  # ~/.cache/glmv-train/models/GLM-4.5V-1f0c93a2b7d4
    open_folder(folder).source                  # reads s3://bucket/GLM-4.5V

Instead of weights the copy has `remote.json`: the URL, and size and version of every file of weights. Its name depends
on the versions of all files, so a folder that has changed gets another copy, and a copy never changes. A file of
weights that is no longer what `remote.json` says is an error. The signature of a URL is kept in memory only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from common import storage
from common.files import sync_folder, write_json, write_text
from common.urls import is_final, is_url, is_web, message, shown, split_signature, url_in
from model.errors import ConfigError, WeightsError
from model.hf_config import CONFIG_FILE
from model.hf_file_names import CHECKSUMS, HF_FILE_NAMES
from model.weights.files import INDEX, SINGLE, LocalFile, WeightFile
from model.weights.stores import FileSystem, NoFolder, NoRanges, Stat, Store, Web

REMOTE = "remote.json"
# The other files of a Hugging Face folder. Web servers list nothing, so the names are known beforehand.
SMALL_FILES = (*HF_FILE_NAMES, INDEX, CHECKSUMS)
LARGEST_SMALL_FILE = 2**28
CHECK_SECONDS = 30.0  # between two looks at whether a file is still the same, where reading does not tell

Result = TypeVar("Result")

_urls: dict[str, str] = {}  # with their signatures, by the address that is shown


@dataclass(frozen=True)
class Remote:
    """What `remote.json` says."""

    url: str  # with its signature, if this process knows it
    files: dict[str, Stat]  # of weights

    def file(self, name: str) -> RemoteFile:
        """Open a file of weights."""
        return RemoteFile(self.url, name, self.files[name])


class RemoteFile:
    """A file behind a URL (see `model.weights.files.WeightFile`). Every process that reads it opens it itself.

    Raises:
        WeightsError: It cannot be read, or has changed.
        StorageError: Its server fails in every attempt.
    """

    def __init__(self, url: str, name: str, stat: Stat) -> None:
        self.name, self.size = shown(url_in(url, name)), stat.size
        self._url, self._file, self._stat = url, name, stat
        self._checked = time.monotonic()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on. Raises EOFError, WeightsError, StorageError."""
        if offset + len(buffer) > self.size:
            raise EOFError(f"{self.name} ends at byte {self.size:,}")
        if len(buffer) == 0:
            return
        _persistently(partial(self._read, buffer, offset), self._url, self.name)

    def _read(self, buffer: memoryview, offset: int) -> None:
        store = _store(self._url)
        store.read_into(self._file, buffer, offset, self._stat)
        if not store.tells_version and time.monotonic() - self._checked > CHECK_SECONDS:
            store.check(self._file, self._stat)
            self._checked = time.monotonic()


# --- folders ----------------------------------------------------------------------------------------------------------


def hf_folder(place: str) -> Path:
    """Return the folder itself, or the local copy of the small files of one behind a URL.

    Raises:
        ConfigError: There is no Hugging Face folder at the URL, or the copy cannot be written.
        WeightsError: The URL cannot be read.
        StorageError: Its server fails in every attempt.
    """
    return local_hf_files(place) if is_url(place) else Path(place)


def remote_of(folder: Path) -> Remote | None:
    """Return where the weights of a folder are, if it is the local copy of one behind a URL."""
    file = folder / REMOTE
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    files = {name: Stat(**stat) for name, stat in content["files"].items()}
    return Remote(_urls.get(content["url"], content["url"]), files)


def title(folder: Path) -> str:
    """Return what a folder is called in messages: its path, or the URL that it is a copy of."""
    remote = remote_of(folder)
    return shown(remote.url) if remote else str(folder)


def has_file(folder: Path, name: str) -> bool:
    """Return whether a folder has a file, perhaps behind its URL."""
    if (folder / name).is_file():
        return True
    remote = remote_of(folder)
    return remote is not None and name in remote.files


def open_file(folder: Path, name: str, *, once: bool = False) -> WeightFile:
    """Open a file of weights of a folder, perhaps behind its URL."""
    remote = remote_of(folder)
    return remote.file(name) if remote else LocalFile(folder / name, once=once)


def kept_text(folder: Path, name: str, make: Callable[[], str]) -> str:
    """Return what `make` returns. Of a folder behind a URL it is made once on this machine, and kept in the copy."""
    if remote_of(folder) is None:
        return make()
    with _lock(_lock_file(folder)):
        if not (folder / name).is_file():
            write_text(folder / name, make())
        return (folder / name).read_text(encoding="utf-8")


def local_hf_files(url: str) -> Path:
    """Copy the small files of a Hugging Face folder, once for all processes of a machine, and return the copy.

    Raises:
        ConfigError, WeightsError, StorageError: As `hf_folder`.
    """
    address, signature = split_signature(url)
    url = address.rstrip("/") + signature
    stats, read = _look(url)
    if CONFIG_FILE not in stats:
        raise NoFolder(url)
    weights = {name: stat for name, stat in stats.items() if name not in SMALL_FILES}
    versions = json.dumps([shown(url), sorted((name, *asdict(stat).values()) for name, stat in stats.items())])
    key = hashlib.sha256(versions.encode()).hexdigest()[:12]
    folder = cache_folder() / f"{shown(url).rpartition('/')[2]}-{key}"
    _urls[shown(url)] = url
    try:
        with _lock(_lock_file(folder)):
            if not (folder / REMOTE).is_file():
                _copy(url, folder, weights, {name: read(name) for name in stats if name in SMALL_FILES})
    except OSError as error:
        raise ConfigError(
            f"the small files of {shown(url)} cannot be written to {folder.parent} ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder on a disk of this machine that can be written"
        ) from None
    return folder


def cache_folder() -> Path:
    """Return the folder of all copies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glmv-train" / "models"


def _look(url: str) -> tuple[dict[str, Stat], Callable[[str], bytes]]:
    """Return size and version of every file of a folder, and what reads a small one."""
    store = _store(url)
    listing = _persistently(store.listing, url, shown(url))

    def stat(name: str) -> Stat | None:
        if listing is not None:
            return listing.get(name)
        return _persistently(partial(store.stat, name), url, shown(url_in(url, name)))

    kept: dict[str, bytes] = {}

    def read(name: str) -> bytes:
        if name not in kept:
            size, where = stats[name].size, shown(url_in(url, name))
            if size > LARGEST_SMALL_FILE:
                raise WeightsError(f"{where} has {size:,} bytes: this is no {name} of a model")
            kept[name] = _persistently(partial(store.whole, name, stats[name]), url, where)
        return kept[name]

    stats = {name: found for name in SMALL_FILES if (found := stat(name)) is not None}
    names = {SINGLE}
    if INDEX in stats:
        names |= _shards(read(INDEX))
    for name in sorted(names):
        if (found := stat(name)) is not None:
            if not found.ranges:
                raise NoRanges(shown(url_in(url, name)))
            stats[name] = found
    return stats, read


def _shards(index: bytes) -> set[str]:
    """Return the files that an index names, as far as it is one: `SafetensorsFolder` says what is wrong with it."""
    try:
        names = json.loads(index)["weight_map"].values()
        return {name for name in names if isinstance(name, str) and Path(name).name == name}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def _copy(url: str, folder: Path, weights: dict[str, Stat], contents: dict[str, bytes]) -> None:
    """Write the copy under a temporary name, and rename it when it is complete."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        write_json(
            temporary / REMOTE,
            {"url": shown(url), "files": {name: asdict(stat) for name, stat in weights.items()}},
        )
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Let one process in at a time. The kernel releases the lock of a process that was killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


# --- requests ---------------------------------------------------------------------------------------------------------


def _store(url: str) -> Store:
    return _store_of_process(url, os.getpid())


@cache
def _store_of_process(url: str, process: int) -> Store:  # a fork does not share connections
    return Web(url) if is_web(url) else FileSystem(url)


def _persistently(work: Callable[[], Result], url: str, name: str) -> Result:
    """Return what `work` returns, after further attempts where another may succeed. Raises as RemoteFile."""
    started = time.monotonic()
    for delay in (*storage.DELAYS, 0.0):
        try:
            return work()
        except (ConfigError, WeightsError):
            raise
        except Exception as error:  # every file system raises errors of its own
            said = message(error, url)
            if is_final(error):
                raise WeightsError(f"{name} cannot be read: {said}") from None
        time.sleep(delay)
    raise storage.given_up(name, said, time.monotonic() - started)
