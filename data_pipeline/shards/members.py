"""What the members of a shard are called, and how they make samples.

A sample is the members that share the name up to the first dot: KEY.json (its record), KEY.0.jpg, KEY.1.png ...
(images in order), KEY.0.mp4 ... (videos in order). Foreign shards may also hold one image as KEY.jpg and its
caption as KEY.txt, as img2dataset writes them.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "avi")
# The most bytes a member may have, by its kind: a reader holds it in memory, and Linux reads 2 GiB at once.
MAX_BYTES = {"json": 1 << 28, "txt": 1 << 28, "image": 1 << 30, "video": 0x7FFFF000}


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie in its tar. kind: what it holds, `json`, `txt`, `image` or `video`.

    xxh3: 64-bit checksum of its bytes. Checking costs a fifth of what CRC-32 does, and next to nothing beside reading.
    """

    kind: str
    offset: int
    size: int
    xxh3: int


@dataclass
class ShardSample:
    """A sample of a shard, its members in the order of their numbers."""

    key: str
    members: list[Member] = field(default_factory=list)


def kind_of(extension: str) -> tuple[str | None, int]:
    """`json` -> (json, 0); `3.jpg` -> (image, 3); `jpg` -> (image, 0); what we do not read -> (None, 0)."""
    number, _, last = extension.lower().rpartition(".")
    if last in ("json", "txt") and not number:
        return last, 0
    kind = "image" if last in IMAGE_EXTENSIONS else "video" if last in VIDEO_EXTENSIONS else None
    return (kind, int(number or 0)) if re.fullmatch("[0-9]{0,9}", number) else (None, 0)


def is_key(key: str) -> bool:
    *folders, last = key.split("/")
    return (
        bool(last) and "." not in last and "\0" not in key and all(folder not in ("", ".", "..") for folder in folders)
    )


def index_command(path: str | Path) -> str:
    return f"`python -m tools.shard index {shlex.quote(str(path))} --tokenizer DIR`"
