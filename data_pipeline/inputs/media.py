"""Files that records name: read only where they may lie, and recognised by what they hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.names import as_stored
from data_pipeline.shards.members import IMAGE_EXTENSIONS, MAX_BYTES, VIDEO_EXTENSIONS

EXTENSIONS = {"images": IMAGE_EXTENSIONS, "videos": VIDEO_EXTENSIONS}
MAX_FILE_BYTES = max(MAX_BYTES.values())  # one file is held in memory whole
CAPTION_FIELDS = ("text", "caption")  # where a record without a domain of ours may have its text

# The first bytes of a file -> its extension. Of RIFF and of MP4 the word that tells stands further on.
_BEGINNINGS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    b"\x1aE\xdf\xa3": "mkv",
}
_RIFF = {b"WEBP": "webp", b"AVI ": "avi"}


def read_media(path: str, folder: Path, field: str, *, allow_outside: bool = False) -> Media:
    """The picture (field `images`) or clip (`videos`) that a record names, its path relative to `folder`.
    Raises BadSample."""
    if "://" in path[:16]:
        raise BadSample("remote_file", f"{path[:200]}: fetch it first (img2dataset does) and give the file")
    full = _locate(path, folder, allow_outside)
    extension = Path(path).suffix.lower().lstrip(".")
    if extension not in EXTENSIONS[field]:
        raise BadSample("unknown_extension", f"{path}: {field} end in one of {', '.join(EXTENSIONS[field])}")
    return Media(extension, _read(full, path))


def read_whole(path: str, folder: Path, *, allow_outside: bool = False) -> bytes:
    """The bytes of a plain file below `folder`: no device or pipe, which may never end, and nothing that a path or a
    link in it reaches outside the folder, unless allow_outside. Raises BadSample."""
    return _read(_locate(path, folder, allow_outside), path)


def _locate(path: str, folder: Path, allow_outside: bool) -> str:
    try:
        full = os.path.realpath(as_stored(os.path.join(folder, path)))
        if allow_outside or Path(full).is_relative_to(os.path.realpath(folder)):
            return full
    except (OSError, ValueError) as error:  # a loop of links, a NUL in the path
        raise BadSample("missing_file", f"{path!r}: {error}") from error
    raise BadSample("outside_folder", f"{path} lies outside its folder: copy it in, or --set allow_outside=true")


def _read(full: str, shown: str) -> bytes:
    try:
        found = os.stat(full)
        if not stat.S_ISREG(found.st_mode):
            raise BadSample("missing_file", f"{shown}: not a plain file")
        if found.st_size > MAX_FILE_BYTES:
            raise BadSample("member_too_large", f"{shown}: {found.st_size:,} bytes")
        return Path(full).read_bytes()
    except OSError as error:
        raise BadSample("missing_file", f"{shown}: {error.strerror}") from error


def recognise(data: bytes, name: str | None = None) -> str | None:
    """The extension for these bytes: what they begin with, else what `name` ends with; None if neither tells."""
    for beginning, extension in _BEGINNINGS.items():
        if data.startswith(beginning):
            return extension
    if data[:4] == b"RIFF" and data[8:12] in _RIFF:
        return _RIFF[data[8:12]]
    if data[4:8] == b"ftyp":
        return "mp4"
    suffix = Path(name).suffix.lower().lstrip(".") if name else ""
    return suffix if suffix in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) else None


def as_media(data: bytes, name: str | None = None) -> tuple[str, Media]:
    """(`images` or `videos`, the file) for bytes of unknown kind. Raises BadSample."""
    extension = recognise(data, name)
    if extension is None:
        raise BadSample(
            "unknown_extension", f"{len(data):,} bytes that begin as no known picture or clip: {data[:8]!r}"
        )
    return ("images" if extension in IMAGE_EXTENSIONS else "videos"), Media(extension, data)


def guess_domain(images: int, videos: int) -> str:
    """The domain of a text that comes with so many pictures and clips, where nothing else says it."""
    return {(0, 0): "text", (1, 0): "image_text", (0, 1): "video"}.get((images, videos), "interleaved")
