"""What a document refers to: a file beside it, or a data: URI. Nothing is ever fetched."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from data_pipeline.errors import BadSample
from data_pipeline.inputs.media import read_whole


def referenced(reference: str, folder: Path, *, allow_outside: bool = False) -> bytes:
    """The bytes that a document in `folder` refers to, as src or href do: percent-encoded, perhaps with a query; one
    that begins with a slash is looked for in `folder` too.

    Raises BadSample: remote_file, outside_folder, missing_file, bad_data_uri.
    """
    reference = reference.strip()
    if is_data_uri(reference):
        return data_uri(reference)
    try:
        parts = urlsplit(reference)
    except ValueError as error:
        raise BadSample("missing_file", f"{reference[:200]}: {error}") from error
    if parts.netloc or parts.scheme not in ("", "file"):
        raise BadSample("remote_file", f"{reference[:200]}: nothing is fetched; save it beside the document")
    return read_whole(unquote(parts.path).lstrip("/"), folder, allow_outside=allow_outside)


def is_data_uri(reference: str) -> bool:
    return reference[:5].lower() == "data:"


def data_uri(uri: str) -> bytes:
    """data:image/png;base64,... -> its bytes. Raises BadSample `bad_data_uri`."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise BadSample("bad_data_uri", f"{uri[:60]} has no comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(re.sub(r"\s", "", unquote(body)), validate=True)
    except ValueError as error:
        raise BadSample("bad_data_uri", f"{uri[:60]}...: {error}") from error
