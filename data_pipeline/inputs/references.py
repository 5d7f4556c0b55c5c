"""References in documents: a file beside the document, or a data: URI. Nothing is fetched from the network."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from data_pipeline.errors import BadSample
from data_pipeline.inputs.media import read_whole


def read_reference(reference: str, folder: Path, *, allow_outside: bool = False) -> bytes:
    """Return the content that a document refers to.

    Args:
        reference: The value of `src` or `href`: percent-encoded, perhaps with a query. A leading slash is ignored.
        folder: The folder of the document.
        allow_outside: Accept files outside `folder`.

    Raises:
        BadSample: remote_file, outside_folder, missing_file, member_too_large or bad_data_uri.
    """
    reference = reference.strip()
    if is_data_uri(reference):
        return decode_data_uri(reference)
    try:
        parts = urlsplit(reference)
    except ValueError as error:
        raise BadSample("missing_file", f"{reference[:200]}: {error}") from error
    if parts.netloc or parts.scheme not in ("", "file"):
        raise BadSample("remote_file", f"{reference[:200]}: nothing is downloaded; save it beside the document")
    return read_whole(unquote(parts.path).lstrip("/"), folder, allow_outside=allow_outside)


def is_data_uri(reference: str) -> bool:
    """Return whether a reference is a data: URI."""
    return reference[:5].lower() == "data:"


def decode_data_uri(uri: str) -> bytes:
    """Return the content of a data: URI, such as data:image/png;base64,...

    Raises:
        BadSample: bad_data_uri.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise BadSample("bad_data_uri", f"{uri[:60]} has no comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(re.sub(r"\s", "", unquote(body)), validate=True)
    except ValueError as error:
        raise BadSample("bad_data_uri", f"{uri[:60]}...: {error}") from error
