"""Images and videos as values of records and tables: paths, data: URIs, base64, bytes, {"bytes", "path"}."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.media import as_media, read_media
from data_pipeline.inputs.references import decode_data_uri, is_data_uri

# How JPEG, PNG, GIF, WebP and AVI, BMP, TIFF, AVIF and HEIC and MP4, Matroska begin in base64.
_BASE64_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0A", "AAAA", "GkXfo")
_SHORTEST_BASE64 = 100  # characters; shorter texts are paths
_PATH_KEYS = ("path", "file_name", "filename", "name")


def media_of_value(value: Any, field: str, folder: Path, *, allow_outside: bool = False) -> Media:
    """Return the image (field `images`) or video (`videos`) that a value stands for.

    Args:
        value: A path relative to `folder`, a data: URI, base64, bytes, or an object of bytes and their path.
        field: `images` or `videos`.
        folder: The folder that files must lie in.
        allow_outside: Accept files outside `folder`.

    Raises:
        BadSample: There is no such file, or it is of another kind.
    """
    data, path = bytes_and_path(value)
    if isinstance(data, str) or (data is None and path):
        text = str(data or path)
        if is_data_uri(text):
            data = decode_data_uri(text)
        elif _is_base64(text):
            data = _decode_base64(text)
        else:
            return read_media(text, folder, field, allow_outside=allow_outside)
    if data is not None and not isinstance(data, bytes):
        raise BadSample("bad_record", f"{field}: a value of type {type(data).__name__} is not a file")
    if not data:
        raise BadSample("missing_file", f"a row without the bytes of one of its {field}")
    actual_field, media = as_media(data, path)
    if actual_field != field:
        raise BadSample("unknown_extension", f"a .{media.extension} file among the {field}")
    return media


def bytes_and_path(value: Any) -> tuple[Any, str | None]:
    """Return the bytes and the path of a value of a table; None for what it does not have."""
    if not isinstance(value, dict):
        return value, None
    data = value["bytes"] if "bytes" in value else next((x for x in value.values() if isinstance(x, bytes)), None)
    path = next((value[key] for key in _PATH_KEYS if isinstance(value.get(key), str)), None)
    return data, path


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError as error:  # a text that was cut off
        raise BadSample("unreadable_image", f"{text[:40]}... is not base64: {error}") from error


def _is_base64(text: str) -> bool:
    return len(text) >= _SHORTEST_BASE64 and text.startswith(_BASE64_BEGINNINGS) and "." not in text
