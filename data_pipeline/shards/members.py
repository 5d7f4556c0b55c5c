"""The names of a shard's members, and how members make samples.

A sample is the members that share the name up to the first dot: KEY.json (its record), KEY.0.jpg, KEY.1.png ...
(images in order), KEY.0.mp4 ... (videos in order). Shards of other programs may also hold one image as KEY.jpg and its
caption as KEY.txt, as img2dataset writes them.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

# Extensions by the formats that are decoded, see media/image_files.FORMATS and media/video_files.CONTAINERS.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "avifs", "heic", "heif", "jfif", "jpe", "mpo"),
    *("apng", "dib", "ico", "jp2", "j2k", "jpc", "j2c", "jpx", "jpf", "ppm", "pgm", "pbm", "pnm", "pfm"),
)
VIDEO_EXTENSIONS = (
    *("mp4", "mkv", "webm", "mov", "avi", "m4v", "3gp", "3g2", "qt", "f4v", "ts", "m2ts", "mts", "flv"),
    *("wmv", "asf", "mpg", "mpeg", "vob", "ogv", "ogm"),
)
# The largest size of a member in bytes, by its kind: a reader holds it in memory, and Linux reads 2 GiB at once.
MAX_BYTES = {"json": 1 << 28, "txt": 1 << 28, "image": 1 << 30, "video": 0x7FFFF000}


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie in its tar."""

    kind: str  # `json`, `txt`, `image` or `video`
    offset: int
    size: int
    xxh3: int  # 64-bit checksum of the bytes; a fifth of the work of CRC-32, and little beside reading


@dataclass
class ShardSample:
    """A sample of a shard."""

    key: str
    members: list[Member] = field(default_factory=list)  # in the order of their numbers


@lru_cache(maxsize=4096)
def kind_of(extension: str) -> tuple[str | None, int]:
    """Return kind and number: `json` -> (json, 0); `3.jpg` -> (image, 3); `jpg` -> (image, 0); others -> (None, 0)."""
    number, _, last = extension.lower().rpartition(".")
    if last in ("json", "txt") and not number:
        return last, 0
    kind = "image" if last in IMAGE_EXTENSIONS else "video" if last in VIDEO_EXTENSIONS else None
    return (kind, int(number or 0)) if re.fullmatch("[0-9]{0,9}", number) else (None, 0)


def is_key(key: str) -> bool:
    """Check that a member named after this key is read back under the same key."""
    *folders, last = key.split("/")
    return (
        bool(last) and "." not in last and "\0" not in key and all(folder not in ("", ".", "..") for folder in folders)
    )


def index_command(path: str | Path, *, chat_form: str = "") -> str:
    """Return the command that indexes a shard or folder, for messages."""
    form = f" --chat-form {chat_form}" if chat_form else ""
    return f"`python -m tools.shard index {shlex.quote(str(path))} --tokenizer DIR{form}`"
