"""Media files that records name: read only inside the permitted folder, and recognised by their content."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.names import as_stored
from data_pipeline.shards.members import IMAGE_EXTENSIONS, MAX_BYTES, VIDEO_EXTENSIONS

EXTENSIONS = {"images": IMAGE_EXTENSIONS, "videos": VIDEO_EXTENSIONS}
MAX_FILE_BYTES = max(MAX_BYTES.values())  # a whole file is held in memory
CAPTION_FIELDS = ("text", "caption")  # where a record without a domain may have its text

# First bytes of a file -> its extension. RIFF and MP4 files are recognised by later bytes.
_MAGIC_BYTES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    b"\x1aE\xdf\xa3": "mkv",
}
_RIFF_TYPES = {b"WEBP": "webp", b"AVI ": "avi"}


def read_media(path: str, folder: Path, field: str, *, allow_outside: bool | None = None) -> Media:
    """Read the image (field `images`) or video (`videos`) that a record names.

    Args:
        path: Path relative to `folder`.
        folder: The folder that the file must lie in.
        field: `images` or `videos`.
        allow_outside: Accept files outside `folder`. None: no, and the input kind has no such option.

    Raises:
        BadSample: remote_file, outside_folder, missing_file, unknown_extension or member_too_large.
    """
    if "://" in path[:16]:
        raise BadSample("remote_file", f"{path[:200]}: download it first (for example with img2dataset)")
    full = _locate(path, folder, allow_outside)
    extension = Path(path).suffix.lower().lstrip(".")
    if extension not in EXTENSIONS[field]:
        raise BadSample("unknown_extension", f"{path}: supported {field} are {', '.join(EXTENSIONS[field])}")
    return Media(extension, _read(full, path))


def read_whole(path: str, folder: Path, *, allow_outside: bool | None = None) -> bytes:
    """Return the content of a regular file below `folder`.

    Devices and pipes, which may never end, are rejected. So is a path or link that leads outside the folder, unless
    allow_outside is set.

    Raises:
        BadSample: outside_folder, missing_file or member_too_large.
    """
    return _read(_locate(path, folder, allow_outside), path)


def _locate(path: str, folder: Path, allow_outside: bool | None) -> str:
    try:
        full = os.path.realpath(as_stored(os.path.join(folder, path)))
        if allow_outside or Path(full).is_relative_to(os.path.realpath(folder)):
            return full
    except (OSError, ValueError) as error:  # a loop of links, a NUL in the path
        raise BadSample("missing_file", f"{path!r}: {error}") from error
    option = "" if allow_outside is None else ", or --set allow_outside=true"
    raise BadSample("outside_folder", f"{path} lies outside its folder: copy it there{option}")


def _read(full: str, shown: str) -> bytes:
    try:
        found = os.stat(full)
        if not stat.S_ISREG(found.st_mode):
            raise BadSample("missing_file", f"{shown}: not a regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise BadSample("member_too_large", f"{shown}: {found.st_size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        return Path(full).read_bytes()
    except OSError as error:
        raise BadSample("missing_file", f"{shown}: {error.strerror}") from error


def detect_extension(data: bytes, name: str | None = None) -> str | None:
    """Return the extension that the first bytes of a file imply, else the one of `name`, or None if it is unknown."""
    for beginning, extension in _MAGIC_BYTES.items():
        if data.startswith(beginning):
            return extension
    if data[:4] == b"RIFF" and data[8:12] in _RIFF_TYPES:
        return _RIFF_TYPES[data[8:12]]
    if data[4:8] == b"ftyp":
        return "mp4"
    suffix = Path(name).suffix.lower().lstrip(".") if name else ""
    return suffix if suffix in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) else None


def as_media(data: bytes, name: str | None = None) -> tuple[str, Media]:
    """Return (`images` or `videos`, the file) for the content of a file of unknown type.

    Raises:
        BadSample: unknown_extension.
    """
    extension = detect_extension(data, name)
    if extension is None:
        raise BadSample(
            "unknown_extension", f"{len(data):,} bytes that are no known image or video, they begin with {data[:8]!r}"
        )
    return ("images" if extension in IMAGE_EXTENSIONS else "videos"), Media(extension, data)


def guess_domain(images: int, videos: int) -> str:
    """Return the domain of a text with this many images and videos, for records that do not name one."""
    return {(0, 0): "text", (1, 0): "image_text", (0, 1): "video"}.get((images, videos), "interleaved")
