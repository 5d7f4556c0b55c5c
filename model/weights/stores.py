"""Files behind a URL: their size and version, and any of their bytes, in one attempt each.

Web         http:// and https://, with requests: fsspec would need aiohttp, which nothing else here needs
FileSystem  every other URL that fsspec knows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import fsspec
import requests

from common.urls import IDENTITY, TIMEOUT, is_web, message, shown, url_in
from model.errors import ConfigError, WeightsError
from model.hf_config import CONFIG_FILE

_CHUNK = 1 << 20
# What changes with a file, in the entries of different file systems.
_VERSIONS = (
    "ETag",
    "etag",
    "generation",
    "blob_id",
    "md5",
    "content_md5",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)


@dataclass(frozen=True)
class Stat:
    """What a server says of a file."""

    size: int
    version: str  # changes when the file does, as far as the server says; empty: it does not
    ranges: bool = True  # whether parts of the file can be read


class NoRanges(WeightsError):
    """A server sends only whole files."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: the server ignores Range and sends whole files, so a rank cannot read its slices; use a server "
            "with support for ranges (object stores, nginx, Apache), or copy the folder to a disk"
        )


class NoFolder(ConfigError):
    """There is no Hugging Face folder at a URL."""

    def __init__(self, url: str, said: str = "") -> None:
        super().__init__(
            f"{shown(url)} has no {CONFIG_FILE}{f' ({said})' if said else ''}: a URL must be that of a Hugging Face "
            "folder; checkpoints and runs are read from disks only"
        )


class Store(Protocol):
    """A folder behind a URL."""

    tells_version: bool  # whether every answer says which version it is of

    def listing(self) -> dict[str, Stat] | None:
        """Return size and version of every file, in one request; None where the server lists nothing.

        Raises NoFolder.
        """

    def stat(self, name: str) -> Stat | None:
        """Return size and version of a file; None if there is none."""

    def whole(self, name: str, stat: Stat) -> bytes:
        """Return the content of a small file."""

    def read_into(self, name: str, buffer: memoryview, offset: int, stat: Stat) -> None:
        """Fill the buffer with the bytes from `offset` on. Raises WeightsError if the file has changed."""

    def check(self, name: str, stat: Stat) -> None:
        """Check that a file is the same. Raises WeightsError."""


def changed(name: str, what: str) -> WeightsError:
    """Return the error of a file that is not what it was."""
    return WeightsError(f"{name} has changed since it was opened ({what}): start again when nothing writes this folder")


def _check(name: str, now: Stat | None, stat: Stat) -> None:
    if now is None:
        raise changed(name, "it is gone")
    if now.size != stat.size:
        raise changed(name, f"{now.size:,} bytes, not {stat.size:,}")
    if now.version and stat.version and now.version != stat.version:
        raise changed(name, "another version of the same size")


class Web:
    """A folder of a web server, of which every answer has the size of the file, and mostly its ETag."""

    tells_version = True

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()

    def listing(self) -> None:
        """Return None: web servers list nothing that programs read."""

    def stat(self, name: str) -> Stat | None:
        """Ask for the first byte: unlike HEAD, this is permitted wherever reading is."""
        with self._get(name, "bytes=0-0") as response:
            if response.status_code in (404, 410):
                return None
            if response.status_code == 416:  # an empty file has no first byte
                return Stat(0, _version(response))
            response.raise_for_status()
            return _stat(response)

    def whole(self, name: str, stat: Stat) -> bytes:
        """Return the content of a small file."""
        with self._get(name, None) as response:
            response.raise_for_status()
            content = response.content
            _check(self._title(name), Stat(len(content), _version(response)), stat)
            return content

    def read_into(self, name: str, buffer: memoryview, offset: int, stat: Stat) -> None:
        """Fill the buffer with the bytes from `offset` on."""
        last, done = offset + len(buffer) - 1, 0
        with self._get(name, f"bytes={offset}-{last}") as response:
            if response.status_code == 416:
                raise changed(self._title(name), f"it ends before byte {last:,}")
            response.raise_for_status()
            if response.status_code != 206:
                raise NoRanges(self._title(name))
            _check(self._title(name), _stat(response), stat)
            if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-{last}/"):
                raise OSError(f"asked for bytes {offset}-{last}, got {response.headers.get('Content-Range')}")
            for chunk in response.iter_content(_CHUNK):
                if done + len(chunk) > len(buffer):
                    raise OSError(f"more than the {len(buffer):,} bytes that were asked for")
                buffer[done : done + len(chunk)] = chunk
                done += len(chunk)
        if done != len(buffer):
            raise OSError(f"{done:,} of {len(buffer):,} bytes arrived")

    def check(self, name: str, stat: Stat) -> None:
        """Check that a file is the same."""
        _check(self._title(name), self.stat(name), stat)

    def _get(self, name: str, part: str | None) -> requests.Response:
        headers = {**IDENTITY, **({"Range": part} if part else {})}
        return self._session.get(url_in(self._url, name), headers=headers, timeout=TIMEOUT, stream=True)

    def _title(self, name: str) -> str:
        return shown(url_in(self._url, name))


def _stat(response: requests.Response) -> Stat:
    """Return what the headers of an answer say of the whole file."""
    if response.status_code == 206:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = response.headers.get("Content-Length", "")
    if not size.isdecimal():
        raise WeightsError(f"{shown(response.url)}: the server does not say how large the file is; use another server")
    return Stat(int(size), _version(response), ranges=response.status_code == 206)


def _version(response: requests.Response) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _stat_of_entry(entry: Mapping[str, Any]) -> Stat | None:
    """Return what a file system says of a file; None for a folder."""
    if entry.get("type") != "file" or entry.get("size") is None:
        return None
    found = [entry[key] for key in _VERSIONS if entry.get(key)]
    texts = (str(value.timestamp() if isinstance(value, datetime) else value) for value in found)
    return Stat(int(entry["size"]), " ".join(texts))


class FileSystem:
    """A folder of a file system that fsspec knows. A file is compared with its version when it is opened."""

    tells_version = False

    def __init__(self, url: str) -> None:
        assert not is_web(url)
        self._url = url
        self._opened: dict[str, Any] = {}

    def listing(self) -> dict[str, Stat]:
        """Return size and version of every file, from the server and not from a list that is kept. Raises NoFolder."""
        system, path = fsspec.core.url_to_fs(self._url)
        system.invalidate_cache(path)
        try:
            entries = system.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:  # the Hub says so too where a token is needed
            raise NoFolder(self._url, message(error, self._url) if " " in str(error) else "") from None
        stats = {str(entry["name"]).rpartition("/")[2]: _stat_of_entry(entry) for entry in entries}
        return {name: stat for name, stat in stats.items() if stat is not None}

    def stat(self, name: str) -> Stat | None:
        """Return size and version of a file; None if there is none."""
        system, path = self._path(name)
        system.invalidate_cache(path.rpartition("/")[0])
        try:
            return _stat_of_entry(system.info(path))
        except FileNotFoundError:
            return None

    def whole(self, name: str, stat: Stat) -> bytes:
        """Return the content of a small file."""
        system, path = self._path(name)
        content = bytes(system.cat_file(path))
        _check(self._title(name), Stat(len(content), ""), stat)
        return content

    def read_into(self, name: str, buffer: memoryview, offset: int, stat: Stat) -> None:
        """Fill the buffer with the bytes from `offset` on."""
        if name not in self._opened:
            self.check(name, stat)
            system, path = self._path(name)
            self._opened[name] = system.open(path, "rb", cache_type="none")
        try:
            file = self._opened[name]
            file.seek(offset)
            content = file.read(len(buffer))
            if len(content) != len(buffer):
                raise OSError(f"{len(content):,} of {len(buffer):,} bytes arrived")
        except Exception:
            self._opened.pop(name, None)  # the next attempt opens it again, and sees whether it has changed
            raise
        buffer[:] = content

    def check(self, name: str, stat: Stat) -> None:
        """Check that a file is the same."""
        _check(self._title(name), self.stat(name), stat)

    def _path(self, name: str) -> tuple[Any, str]:
        system, path = fsspec.core.url_to_fs(url_in(self._url, name))  # one object per process, which fsspec keeps
        return system, path

    def _title(self, name: str) -> str:
        return shown(url_in(self._url, name))
