"""A sample as filters see it: its record, and its images and videos, decoded on demand and once."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from data_pipeline.curation.thumbnails import Thumbnails, read_thumbnails
from data_pipeline.media.image_files import decode_image, probe_image
from data_pipeline.media.video_files import VideoInfo, probe_video
from data_pipeline.shards.reader import RawSample

_PLACEHOLDERS = ("<image>", "<video>")


class Candidate:
    """One sample of a shard. Properties that decode media raise BadSample.

    Attributes:
        name: SHARD/KEY.
        record: The JSON record.
        images: Image files.
        videos: Video files.
    """

    def __init__(self, name: str, raw: RawSample) -> None:
        """Take a sample as it was read from its shard."""
        self.name = name
        self.record: dict[str, Any] = raw.record
        self.images, self.videos = raw.images, raw.videos

    @property
    def domain(self) -> str:
        """The sample's domain."""
        return str(self.record.get("domain", ""))

    @cached_property
    def text(self) -> str:
        """The whole text without placeholders of images and videos. The turns of a chat are lines."""
        return text_of(self.record)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image, from its header."""
        return [probe_image(data) for data in self.images]

    @cached_property
    def video_infos(self) -> list[VideoInfo]:
        """Size, duration and frame rate of every video, from its container."""
        return [probe_video(data) for data in self.videos]

    @cached_property
    def pixels(self) -> list[np.ndarray]:
        """Every image decoded: uint8 [height, width, 3]."""
        return [decode_image(data) for data in self.images]

    @cached_property
    def image_hashes(self) -> list[int]:
        """The 64-bit perceptual hash of every image."""
        return [perceptual_hash(pixels) for pixels in self.pixels]

    @cached_property
    def thumbnails(self) -> list[Thumbnails]:
        """Small grey frames of every video. All of its frames are decoded."""
        return [read_thumbnails(data) for data in self.videos]


def text_of(record: dict[str, Any]) -> str:
    """Return the text of a record, as `Candidate.text`."""
    if isinstance(record.get("messages"), list):
        turns = [turn for turn in record["messages"] if isinstance(turn, dict)]
        parts = [text for turn in turns for text in (turn.get("reasoning_content"), turn.get("content"), _calls(turn))]
    else:
        parts = [record.get("text")]
    text = "\n".join(part for part in parts if isinstance(part, str) and part)
    for placeholder in _PLACEHOLDERS:
        text = text.replace(placeholder, " ")
    # JSON may contain half of a surrogate pair, which cannot be hashed or written.
    return text.strip().encode("utf-8", "replace").decode()


def _calls(turn: dict[str, Any]) -> str:
    """Return the calls of a message as text: chats that differ in them alone are not duplicates."""
    return json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""


def perceptual_hash(pixels: np.ndarray) -> int:
    """Return imagehash's phash as an integer of 64 bits: 8x8 low frequencies of a 32x32 image against their median.

    Args:
        pixels: uint8 [height, width, 3] or [height, width].
    """
    bits = imagehash.phash(Image.fromarray(pixels)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
