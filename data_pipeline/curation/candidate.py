"""A sample as filters see it: its record, and whatever of its pictures and clips they ask for, decoded once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from data_pipeline.curation.thumbnails import Thumbnails, read_thumbnails
from data_pipeline.media.images import decode_image, probe_image
from data_pipeline.media.video import VideoInfo, probe_video
from data_pipeline.shards.reader import RawSample

_PLACEHOLDERS = ("<image>", "<video>")


class Candidate:
    """One sample of a shard. Properties that decode raise BadSample.

    name: SHARD/KEY. record, images and videos: as they lie in the shard.
    """

    def __init__(self, name: str, raw: RawSample):
        self.name = name
        self.record: dict[str, Any] = raw.record
        self.images, self.videos = raw.images, raw.videos

    @property
    def domain(self) -> str:
        return str(self.record.get("domain", ""))

    @cached_property
    def text(self) -> str:
        """All words of the sample, without the places of its pictures and clips. The turns of a chat are lines."""
        return text_of(self.record)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every picture, from its header."""
        return [probe_image(data) for data in self.images]

    @cached_property
    def clips(self) -> list[VideoInfo]:
        """What the container of every clip says."""
        return [probe_video(data) for data in self.videos]

    @cached_property
    def pictures(self) -> list[np.ndarray]:
        """uint8 [height, width, 3] of every picture."""
        return [decode_image(data) for data in self.images]

    @cached_property
    def picture_hashes(self) -> list[int]:
        """The 64-bit perceptual hash of every picture."""
        return [perceptual_hash(picture) for picture in self.pictures]

    @cached_property
    def thumbnails(self) -> list[Thumbnails]:
        """Small grey frames of every clip, which is decoded to its end."""
        return [read_thumbnails(data) for data in self.videos]


def text_of(record: dict[str, Any]) -> str:
    """See Candidate.text."""
    if isinstance(record.get("messages"), list):
        turns = [turn for turn in record["messages"] if isinstance(turn, dict)]
        parts = [turn.get(part) for turn in turns for part in ("reasoning_content", "content")]
    else:
        parts = [record.get("text")]
    text = "\n".join(part for part in parts if isinstance(part, str) and part)
    for placeholder in _PLACEHOLDERS:
        text = text.replace(placeholder, " ")
    # JSON may hold half of a surrogate pair, which is no character and cannot be hashed or written.
    return text.strip().encode("utf-8", "replace").decode()


def perceptual_hash(picture: np.ndarray) -> int:
    """imagehash's phash (8x8 low frequencies of a 32x32 picture, against their median) as an integer of 64 bits.

    picture: uint8 [height, width, 3] or [height, width]."""
    bits = imagehash.phash(Image.fromarray(picture)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
