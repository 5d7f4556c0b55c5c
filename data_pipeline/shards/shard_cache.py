"""Shards that lie elsewhere: a source's path may be a URL (s3://, gs://, https:// ... whatever fsspec knows).

    cache = ShardCache("/scratch/shards", max_bytes=500 << 30)
    descriptor = cache.open("s3://bucket/captions/caption-00017.tar", fingerprint)

A shard is fetched whole when it is first read, once for all processes of a machine, and kept in the cache's folder; the
one that has not been opened for longest goes first when the folder is full. What a shard holds is checked sample by
sample when it is read, so a cache that was damaged does no harm. Which shards there are is said by the catalogue beside
them (catalogue.py), so nothing is listed, which web servers could not do.

What follows a `?` in the address of a web server, a signature that permits reading, goes behind the name of every file
that is asked for, and into no message.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import fsspec
import requests

from data_pipeline.errors import BadSample, DataError
from data_pipeline.shards.tar import size_in

DEFAULT_FOLDER = "~/.cache/glmv-train/shards"
DELAYS = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth attempt
GIVE_UP_SECONDS = 300  # for so long a shard that could not be fetched is not asked for again
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
LOCKS = 64
_CHUNK = 1 << 20
_COPIES = "[0-9a-f]" * 32 + ".tar"  # a folder may also hold tars of its owner

Result = TypeVar("Result")


def is_url(path: str) -> bool:
    return "://" in path


def split_url(url: str) -> tuple[str, str]:
    """The URL of a folder, or of files in one -> the folder, and the pattern of their names."""
    address, signature = _signed(url)
    folder, pattern = address.rstrip("/"), "*.tar"
    last = folder.rpartition("/")[2]
    if last.endswith(".tar") or any(character in last for character in "*?["):
        folder, pattern = folder.rpartition("/")[0], unquote(last) if _is_web(url) else last
    return folder + signature, pattern


def url_in(folder: str, name: str) -> str:
    """The URL of a file in a folder.

    >>> url_in("https://host/shards?sig=abc", "a b.tar")
    'https://host/shards/a%20b.tar?sig=abc'
    """
    address, signature = _signed(folder)
    return f"{address}/{quote(name) if _is_web(folder) else name}{signature}"


def shown(url: str) -> str:
    """A path or URL as it may be written down: a signature is as good as a password."""
    return _signed(url)[0]


def _signed(url: str) -> tuple[str, str]:
    """An address, and its signature from the `?` on."""
    address, mark, signature = url.partition("?") if _is_web(url) else (url, "", "")
    return address, mark + signature


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


class ShardCache:
    """A folder of copies. folder: empty means DEFAULT_FOLDER; max_bytes: of all shards in it, 0 keeps every one.

    Any number of processes may share a folder. A copy is renamed into place when it is whole, and may be removed while
    others read it: they keep what they have opened.
    """

    def __init__(self, folder: str = "", max_bytes: int = 0):
        self.folder, self.max_bytes = Path(folder or DEFAULT_FOLDER).expanduser(), max_bytes
        self._failed: dict[str, tuple[float, str]] = {}  # URL -> when, and what was said

    def catalogue(self, url: str) -> Path:
        """A copy of the newest version of a file. Raises DataError if there is none or it cannot be fetched."""
        try:
            path = self.folder / f"{_digest(shown(url), _patiently(lambda: _version(url)))}.arrow"
            if not path.is_file():
                self._fetch(url, path, size=None)
        except DataError:
            raise
        except Exception as error:  # every file system raises errors of its own
            raise DataError(
                f"{shown(url)} cannot be fetched ({_said(error, url)}): a source that is a URL needs the catalogue "
                "that `python -m tools.shard build` and `index` write, copied with its shards"
            ) from error
        return path

    def open(self, url: str, fingerprint: str) -> int:
        """A file descriptor of a copy of the shard that had this fingerprint when it was indexed. Raises BadSample
        (`unreadable_shard`) if it cannot be fetched."""
        path = self._path(url, fingerprint)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch_or_give_up(url, path, size_in(fingerprint))
                continue
            with suppress(OSError):  # of a copy that another user has fetched, or on a disk that is only read
                os.utime(descriptor, ns=(time.time_ns(),) * 2)  # opened last: see _evict
            return descriptor

    def discard(self, url: str, fingerprint: str) -> None:
        """Removes a copy that is not what it should be, to be fetched anew."""
        self._path(url, fingerprint).unlink(missing_ok=True)

    def _path(self, url: str, fingerprint: str) -> Path:
        return self.folder / f"{_digest(shown(url), fingerprint)}.tar"

    def _fetch_or_give_up(self, url: str, path: Path, size: int) -> None:
        when, said = self._failed.get(url, (0.0, ""))
        if not said or time.monotonic() - when > GIVE_UP_SECONDS:
            try:
                self._fetch(url, path, size)
                self._failed.pop(url, None)
                return
            except Exception as error:  # as above
                said = _said(error, url)
                self._failed[url] = (time.monotonic(), said)
        raise BadSample("unreadable_shard", f"{shown(url)} cannot be fetched: {said}")

    def _fetch(self, url: str, path: Path, size: int | None) -> None:
        """Copies a file into the cache unless another process has just done so. A copy of another size than was indexed
        is fetched once more, in case it was cut on its way, and kept if it stays so: its samples are checked anyway.
        Raises DataError if the folder cannot be written."""
        temporary = path.with_suffix(".tmp")
        with self._lock(zlib.crc32(path.name.encode()) % LOCKS):
            if path.is_file():
                return
            try:
                for _ in range(2):
                    _patiently(lambda: _download(url, temporary))
                    if size is None or temporary.stat().st_size == size:
                        break
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(
                    f"data.cache_dir {self.folder} is full ({error.strerror}): make room, or set data.cache_bytes to "
                    "less than there is"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)  # half of a shard
        if self.max_bytes:
            self._evict(keep=path)

    def _evict(self, keep: Path) -> None:
        with self._lock(LOCKS):
            copies = sorted(self._copies())
            room = self.max_bytes - sum(size for _, size, _ in copies)
            for _, size, path in copies:
                if room < 0 and path != keep:
                    path.unlink(missing_ok=True)
                    room += size

    def _copies(self) -> Iterator[tuple[int, int, Path]]:
        """When each was opened last, its bytes and its path. Others may discard one meanwhile."""
        for path in self.folder.glob(_COPIES):
            with suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    @contextmanager
    def _lock(self, number: int) -> Iterator[None]:
        """One process at a time. The kernel lets go of the lock of a process that was killed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / f"{number:02d}.lock", "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise DataError(
                f"data.cache_dir {self.folder} cannot be written ({error.strerror}): name a folder that can"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _patiently(work: Callable[[], Result]) -> Result:
    """Tries again after a while what may work then."""
    for delay in DELAYS:
        try:
            return work()
        except Exception as error:  # every file system raises errors of its own
            if _is_final(error):
                raise
            time.sleep(delay)
    return work()


def _is_final(error: Exception) -> bool:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 429)
    return isinstance(error, ImportError | FileNotFoundError | PermissionError | ValueError)


def _said(error: Exception, url: str) -> str:
    signature = _signed(url)[1]
    said = str(error).replace(signature, "?...") if signature else str(error)
    return said if isinstance(error, DataError) else f"{type(error).__name__}: {said}"


# Web servers are read with requests: fsspec would want aiohttp, which nothing else here needs.


def _version(url: str) -> str:
    """Changes when the file does, as far as its server says."""
    if _is_web(url):
        response = requests.head(url, timeout=TIMEOUT, allow_redirects=True)
        response.raise_for_status()
        return "\n".join(response.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length"))
    file_system, path = fsspec.core.url_to_fs(url)
    return json.dumps(file_system.info(path), sort_keys=True, default=str)


def _download(url: str, path: Path) -> None:
    with open(path, "wb") as file, _opened(url) as source:
        shutil.copyfileobj(source, file, _CHUNK)


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    if not _is_web(url):
        with fsspec.open(url, "rb") as file:
            yield file
        return
    with requests.get(url, stream=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        yield response.raw
