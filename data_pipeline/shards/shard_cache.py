"""Shards behind a URL: a source's path may be s3://, gs://, https:// or any other URL that fsspec knows.

    cache = ShardCache("/scratch/shards", max_bytes=500 << 30)
    descriptor = cache.open("s3://bucket/captions/caption-00017.tar", fingerprint)

A shard is fetched completely when it is first read, once for all processes of a machine, and kept in the cache folder.
When the folder is full, the least recently opened shard is removed. Samples are checked when they are read, so a
damaged cache does no harm. The catalogue beside the shards (catalogue.py) lists them, as web servers cannot.

A web address may end with `?` and a signature that permits reading. It is appended to the address of every file that is
requested, and appears in no message.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import requests

from common.urls import IDENTITY, TIMEOUT, is_final, is_missing, is_web, message, shown, split_signature, with_retries
from data_pipeline.errors import DataError, LostShard, Unavailable
from data_pipeline.shards.tar import size_in

DEFAULT_FOLDER = "~/.cache/glmv-train/shards"
DELAYS = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth attempt
GIVE_UP_SECONDS = 300  # before a shard that could not be fetched is requested again
LOCKS = 64
_CHUNK = 1 << 20
_HEAD_REFUSED = (400, 403, 405, 501)  # some servers, and signatures for GET alone, do not answer HEAD
_CATALOGUE_ADVICE = (
    "a source that is a URL needs the catalogue that `python -m tools.shard build` and `index` write, copied with its "
    "shards"
)
_COPIES = "[0-9a-f]" * 32 + ".tar"  # the folder may also hold tars of the user


def split_url(url: str) -> tuple[str, str]:
    """Split the URL of a folder, or of files in one, into the folder's URL and the pattern of their names."""
    address, signature = split_signature(url)
    folder, pattern = address.rstrip("/"), "*.tar"
    last = folder.rpartition("/")[2]
    if last.endswith(".tar") or any(character in last for character in "*?["):
        folder, pattern = folder.rpartition("/")[0], unquote(last) if is_web(url) else last
    return folder + signature, pattern


class ShardCache:
    """A folder of copies.

    Any number of processes may share a folder. A copy is renamed into place when it is complete, and may be removed
    while others read it: they keep their open files.

    Copies are not flushed to disk: what a power cut damages fails its checksums when it is read, and is fetched again.
    """

    def __init__(self, folder: str = "", max_bytes: int = 0) -> None:
        """Create a cache.

        Args:
            folder: Where copies are kept; empty: DEFAULT_FOLDER.
            max_bytes: The most bytes that all copies of shards may take; 0: no limit.
        """
        self.folder, self.max_bytes = Path(folder or DEFAULT_FOLDER).expanduser(), max_bytes
        self._failed: dict[str, tuple[float, str]] = {}  # by URL: when, and the message

    def catalogue(self, url: str) -> Path:
        """Return a copy of the newest version of a catalogue.

        Raises:
            DataError: There is none, or it cannot be fetched.
        """
        try:
            return self._newest(url)
        except DataError:
            raise
        except Exception as error:  # every file system raises errors of its own
            raise _cannot_be_fetched(url, error) from error

    def find(self, url: str) -> Path | None:
        """Return a copy of the newest version of a file beside shards; None if there is none.

        Raises:
            DataError: It cannot be fetched.
        """
        try:
            return self._newest(url)
        except DataError:
            raise
        except Exception as error:  # as above
            if is_missing(error):
                return None
            raise _cannot_be_fetched(url, error) from error

    def _newest(self, url: str) -> Path:
        path = self.folder / f"{_digest(shown(url), with_retries(lambda: _version(url), DELAYS))}.arrow"
        if not path.is_file():
            self._fetch(url, path, None, DELAYS)
        return path

    def open(self, url: str, fingerprint: str, *, delays: Sequence[float] | None = None, may_wait: bool = False) -> int:
        """Open a copy of a shard.

        Args:
            url: The shard.
            fingerprint: The fingerprint of the tar as it was indexed.
            delays: Seconds before every further request, if the first fails; by default DELAYS.
            may_wait: Whether the caller opens it again later if another request may succeed then.

        Returns:
            A file descriptor.

        Raises:
            LostShard: `unreadable_shard`, if it cannot be fetched.
            Unavailable: With `may_wait`, if it may be fetched later.
        """
        path = self._copy(url, fingerprint)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch_or_give_up(url, path, size_in(fingerprint), DELAYS if delays is None else delays, may_wait)
                continue
            with suppress(OSError):  # the copy of another user, or a read-only disk
                os.utime(descriptor, ns=(time.time_ns(),) * 2)  # when it was opened last: see _evict
            return descriptor

    def discard(self, url: str, fingerprint: str) -> None:
        """Remove a damaged copy, so that it is fetched again."""
        self._copy(url, fingerprint).unlink(missing_ok=True)

    def _copy(self, url: str, fingerprint: str) -> Path:
        return self.folder / f"{_digest(shown(url), fingerprint)}.tar"

    def _fetch_or_give_up(self, url: str, path: Path, size: int, delays: Sequence[float], may_wait: bool) -> None:
        when, reason = self._failed.get(url, (0.0, ""))
        if not reason or time.monotonic() - when > GIVE_UP_SECONDS:
            try:
                self._fetch(url, path, size, delays)
                self._failed.pop(url, None)
                return
            except Exception as error:  # as above
                reason = _message(error, url)
                if may_wait and (is_missing(error) or not is_final(error)):
                    raise Unavailable(reason) from error
                self._failed[url] = (time.monotonic(), reason)
        raise LostShard("unreadable_shard", f"{shown(url)} cannot be fetched: {reason}")

    def _fetch(self, url: str, path: Path, size: int | None, delays: Sequence[float]) -> None:
        """Copy a file into the cache, unless another process has just done so.

        A copy of another size than was indexed is fetched once more, in case the transfer was cut. If the size is the
        same again the copy is kept: its samples are checked anyway.

        Raises:
            DataError: The folder is full or cannot be written.
        """
        temporary = path.with_suffix(".tmp")
        with self._lock(zlib.crc32(path.name.encode()) % LOCKS):
            if path.is_file():
                return
            try:
                for _ in range(2):
                    with_retries(lambda: _download(url, temporary), delays)
                    if size is None or temporary.stat().st_size == size:
                        break
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(
                    f"data.cache_dir {self.folder} is full ({error.strerror}): free space on its disk, or set "
                    "data.cache_bytes to less than the disk holds"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)  # an incomplete copy
        if self.max_bytes:
            self._evict(keep=path)

    def _evict(self, keep: Path) -> None:
        with self._lock(LOCKS):
            copies = sorted(self._copies())
            space_left = self.max_bytes - sum(size for _, size, _ in copies)
            for _, size, path in copies:
                if space_left < 0 and path != keep:
                    path.unlink(missing_ok=True)
                    space_left += size

    def _copies(self) -> Iterator[tuple[int, int, Path]]:
        """Yield when each copy was opened last, its bytes and its path. Other processes may remove one meanwhile."""
        for path in self.folder.glob(_COPIES):
            with suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    @contextmanager
    def _lock(self, number: int) -> Iterator[None]:
        """Let one process in at a time. The kernel releases the lock of a process that was killed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / f"{number:02d}.lock", "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise DataError(
                f"data.cache_dir {self.folder} cannot be written ({error.strerror}): choose a folder that can"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _cannot_be_fetched(url: str, error: Exception) -> DataError:
    advice = _CATALOGUE_ADVICE if is_missing(error) else "check the address and the right to read it"
    return DataError(f"{shown(url)} cannot be fetched ({_message(error, url)}): {advice}")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _message(error: Exception, url: str) -> str:
    return str(error) if isinstance(error, DataError) else message(error, url)


# Web servers are read with requests: fsspec would need aiohttp, which nothing else here needs.


def _version(url: str) -> str:
    """Return a text that changes when the file does, as far as its server says."""
    if is_web(url):
        response = requests.head(url, timeout=TIMEOUT, allow_redirects=True)
        if response.status_code in _HEAD_REFUSED:
            with requests.get(url, stream=True, timeout=TIMEOUT, headers=IDENTITY) as response:
                response.raise_for_status()
        response.raise_for_status()
        return "\n".join(response.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length"))
    file_system, path = fsspec.core.url_to_fs(url)
    return json.dumps(file_system.info(path), sort_keys=True, default=str)


def _download(url: str, path: Path) -> None:
    with open(path, "wb") as file, _opened(url) as source:
        shutil.copyfileobj(source, file, _CHUNK)


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """Open a file to read it from its beginning to its end."""
    if not is_web(url):
        with fsspec.open(url, "rb") as file:
            yield file
        return
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=IDENTITY) as response:
        response.raise_for_status()
        yield response.raw
