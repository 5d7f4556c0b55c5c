"""Media files that records name: read only inside the permitted folder, and recognised by their content."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.names import as_stored
from data_pipeline.media.file_types import HEAD_BYTES, describe, file_type
from data_pipeline.shards.members import IMAGE_EXTENSIONS, MAX_BYTES, VIDEO_EXTENSIONS

EXTENSIONS = {"images": IMAGE_EXTENSIONS, "videos": VIDEO_EXTENSIONS}
_LONGEST_PATH = 4096  # characters
MAX_FILE_BYTES = max(MAX_BYTES.values())  # a whole file is held in memory
CODE_SUFFIXES = (".ts", ".mts")  # of videos, and also of programs in TypeScript
CAPTION_FIELDS = ("text", "caption")  # where a record without a domain may have its text


def read_media(path: str, folder: Path, field: str, *, allow_outside: bool | None = None) -> Media:
    """Read the image (field `images`) or video (`videos`) that a record names.

    Args:
        path: Path relative to `folder`.
        folder: The folder that the file must lie in.
        field: `images` or `videos`.
        allow_outside: Accept files outside `folder`. None: no, and the input kind has no such option.

    Raises:
        BadSample: remote_file, outside_folder, missing_file, unknown_extension, unreadable_image or member_too_large.
    """
    if len(path) > _LONGEST_PATH:
        detail = f"{path[:60]}... has {len(path):,} characters: it is not a path, nor base64 of a known format"
        raise BadSample("missing_file", detail)
    if "://" in path[:16]:
        raise BadSample("remote_file", f"{path[:200]}: download it first (for example with img2dataset)")
    full = _locate(path, folder, allow_outside)
    if _extension_of(path) not in EXTENSIONS[field] and not is_media(read_head(Path(full))):
        raise BadSample("unknown_extension", f"{path}: supported {field} are {', '.join(EXTENSIONS[field])}")
    actual_field, media = as_media(_read(full, path), path)
    if actual_field != field:
        raise BadSample("unknown_extension", f"{path}: a .{media.extension} file among the {field}")
    return media


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


def _read(full: str, shown: str, most: int = -1) -> bytes:
    try:
        found = os.stat(full)
        if not stat.S_ISREG(found.st_mode):
            raise BadSample("missing_file", f"{shown}: not a regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise BadSample("member_too_large", f"{shown}: {found.st_size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        with open(full, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise BadSample("missing_file", f"{shown}: {error.strerror}") from error


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file, enough for media.file_types.file_type; none if it cannot be read."""
    try:
        return _read(str(path), path.name, HEAD_BYTES)
    except BadSample:
        return b""


def as_media(data: bytes, name: str | None = None) -> tuple[str, Media]:
    """Return (`images` or `videos`, the file) for the content of a file, whatever its name says.

    Args:
        data: The content.
        name: The name that the file was given. It matters where the content is of no known type: the file is then
            what its name says, and the decoder says what is wrong with it.

    Raises:
        BadSample: unknown_extension; unreadable_image or unreadable_video if the content is of a type that is not read.
    """
    found = file_type(data)
    extension = _extension_of(name)
    if found is not None and found.kind != "other":
        return f"{found.kind}s", Media(extension if extension in found.also else found.extension, data)
    if found is not None:
        reason = "unreadable_video" if extension in VIDEO_EXTENSIONS else "unreadable_image"
        raise BadSample(reason, f"{name + ': ' if name else ''}{describe(data)}")
    field = next((field for field, known in EXTENSIONS.items() if extension in known), None)
    if field is None:
        raise BadSample(
            "unknown_extension", f"{len(data):,} bytes that are no known image or video, they begin with {data[:8]!r}"
        )
    return field, Media(extension, data)


def _extension_of(name: str | None) -> str:
    return Path(name).suffix.lower().lstrip(".") if name else ""


def has_media_name(name: str) -> bool:
    """Return whether a file has the name of an image or video."""
    return any(_extension_of(name) in known for known in EXTENSIONS.values())


def is_media(head: bytes) -> bool:
    """Return whether the first bytes of a file (read_head) are those of an image or video."""
    found = file_type(head)
    return found is not None and found.kind != "other"


def guess_domain(images: int, videos: int) -> str:
    """Return the domain of a text with this many images and videos, for records that do not name one."""
    return {(0, 0): "text", (1, 0): "image_text", (0, 1): "video"}.get((images, videos), "interleaved")
