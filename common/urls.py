"""URLs of files: how they are joined and shown, and which requests may succeed later.

A web address may end with `?` and a signature that permits reading. It is appended to the address of every file that is
requested, and appears in no message.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import quote

TIMEOUT = (10, 60)  # seconds to connect, and between two parts of a response
IDENTITY = {"Accept-Encoding": "identity"}  # bytes as they are stored

# What is as good as a password in a text: what follows a `?`, also of the address of a redirect, and user:password@.
_QUERY = re.compile(r"\?[^\s?'\"<>)]*=[^\s'\"<>)]*")
_USER = re.compile(r"(?<=://)[^/@\s]+@")
# Errors of libraries that are not installed here: nothing was sent, because nobody has signed in.
_NOT_SIGNED_IN = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}

Result = TypeVar("Result")


def is_url(path: str) -> bool:
    """Check whether a path is a URL."""
    return "://" in path


def is_web(url: str) -> bool:
    """Check whether a URL is that of a web server."""
    return url.startswith(("http://", "https://"))


def split_signature(url: str) -> tuple[str, str]:
    """Return an address, and its signature from the `?` on."""
    address, mark, signature = url.partition("?") if is_web(url) else (url, "", "")
    return address, mark + signature


def url_in(folder: str, name: str) -> str:
    """Return the URL of a file in a folder.

    >>> url_in("https://host/shards?sig=abc", "a b.tar")
    'https://host/shards/a%20b.tar?sig=abc'
    """
    address, signature = split_signature(folder)
    return f"{address}/{quote(name) if is_web(folder) else name}{signature}"


def shown(url: str) -> str:
    """Return a path or URL without its signature and password: for messages and file names."""
    address = split_signature(url)[0]
    return _USER.sub("", address) if is_web(url) else address


def message(error: Exception, url: str) -> str:
    """Return what an error about a URL says, in one line, without signatures and passwords."""
    signature = split_signature(url)[1]
    text = str(error).replace(signature, "?...") if signature else str(error)
    text = _QUERY.sub("?...", " ".join(text.split()))
    return f"{type(error).__name__}: {_USER.sub('', text) if is_web(url) else text}"


# --- requests that fail -----------------------------------------------------------------------------------------------


def with_retries(work: Callable[[], Result], delays: Sequence[float]) -> Result:
    """Do `work`, and try again after each delay what may succeed then."""
    for delay in delays:
        try:
            return work()
        except Exception as error:  # every file system raises errors of its own
            if is_final(error):
                raise
            time.sleep(delay)
    return work()


def is_missing(error: Exception) -> bool:
    """Return whether an error says that there is no such file."""
    return isinstance(error, FileNotFoundError) or _status(error) in (404, 410)


def is_final(error: Exception) -> bool:
    """Return whether another attempt would end with the same error."""
    if (status := _status(error)) is not None:
        return 400 <= status < 500 and status not in (408, 429)
    known = isinstance(error, ImportError | FileNotFoundError | PermissionError | ValueError)
    return known or type(error).__name__ in _NOT_SIGNED_IN


def _status(error: Exception) -> int | None:
    """Return the status of the response that an error is about, in the form of requests and of the Hub's client."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
