"""Videos as files: opening them, what their header says, and which frames the model sees of them.

The reference is transformers' `Glm4vVideoProcessor` reading files with PyAV: two frames per second (at most 600, spread
over a video longer than five minutes), an even number of them, every two neighbours one frame pair with one timestamp.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer

from data_pipeline.errors import BadSample
from data_pipeline.media.image_sizes import grid_of, resized_size
from data_pipeline.media.pixel_budget import MAX_DECODED_PIXELS, TEMPORAL_PATCH_SIZE

SAMPLED_FPS = 2
MAX_DURATION = 300  # seconds; a longer video is sampled MAX_DURATION * SAMPLED_FPS times

_EQUAL_SIZES = re.compile(rb"stsz\0{4}(.{4})(.{4})", re.DOTALL)  # bytes of each frame (0: a table follows), frames

# FFmpeg knows other formats, but some of them are lists of addresses to fetch (HLS, concat) and not videos.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"


@dataclass(frozen=True)
class VideoInfo:
    """What the container says: enough to know a video's frames, timestamps and tokens without decoding it."""

    frames: int
    fps: float
    duration: float  # seconds
    height: int  # pixels
    width: int  # pixels


@dataclass(frozen=True)
class VideoGeometry:
    """How the model sees a video."""

    indices: tuple[int, ...]  # the sampled frames, an even number
    seconds: tuple[int, ...]  # one whole second per frame pair, written after it
    size: tuple[int, int]  # (H, W) pixels

    @property
    def grid(self) -> tuple[int, int]:
        """The (h, w) patches of every frame pair."""
        return grid_of(self.size)


def probe_video(data: bytes) -> VideoInfo:
    """Read the container's header, and count packets if the header does not give the number of frames.

    Raises:
        BadSample: The header cannot be read, has no video stream, or its frames are too large.
    """
    with open_video(data) as container:
        frames = container.streams.video[0].frames
        return video_info(container, frames or len(video_packets(container)))


def frame_indices(frames: int, fps: float, duration: float | None) -> list[int]:
    """Return the indices of the sampled frames, in order, an even number (the last one may be repeated)."""
    last = frames - 1
    duration = duration or round(last / fps) + 1
    if duration <= MAX_DURATION:
        samples = max(math.floor(duration * SAMPLED_FPS), 1)
        chosen = [min(last, math.ceil(i * fps / SAMPLED_FPS)) for i in range(samples)]
    elif frames <= MAX_DURATION * SAMPLED_FPS:
        chosen = list(range(frames))
    else:
        times = np.linspace(0, duration, MAX_DURATION * SAMPLED_FPS, endpoint=True)
        chosen = [min(last, math.ceil(t * fps)) for t in times]
    unique = list(dict.fromkeys(chosen))
    return unique + unique[-1:] if len(unique) % 2 else unique


def video_geometry(info: VideoInfo, max_tokens: int) -> VideoGeometry:
    """Choose frames, timestamps and size from the header alone.

    Raises:
        BadSample: `extreme_aspect`.
    """
    indices = frame_indices(info.frames, info.fps, info.duration)
    seconds = tuple(int(index / info.fps) for index in indices[::TEMPORAL_PATCH_SIZE])
    size = resized_size(info.height, info.width, max_tokens=max_tokens, frames=len(indices))
    return VideoGeometry(tuple(indices), seconds, size)


@contextmanager
def open_video(data: bytes) -> Iterator[InputContainer]:
    """Open a container with a video stream that can be decoded. Errors while it is open become BadSample."""
    _check_sample_table(data)
    try:
        with av.open(io.BytesIO(data), "r", options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise BadSample("video_without_frames", "the file has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadSample("unreadable_video", "no decoder for its codec")
            stream.codec_context.thread_count = 1  # a data worker is one process among many
            yield container
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(
            "unreadable_video", f"not a video of a supported format ({len(data)} bytes): {error}"
        ) from error


def _check_sample_table(data: bytes) -> None:
    """Reject a header that promises more bytes than the file can hold.

    A few bytes of an MP4 may claim hundreds of millions of frames of equal size. FFmpeg makes a table of them as it
    opens the file, which takes gigabytes. (Old sound tracks count several samples per byte.)
    """
    for box in _EQUAL_SIZES.finditer(data):
        size, count = (int.from_bytes(field) for field in box.groups())
        if size * count > 16 * len(data):
            raise BadSample("unreadable_video", f"its header promises {count} frames of {size} bytes each")


def video_packets(container: InputContainer) -> list[av.Packet]:
    """Return the packets of the video stream in decoding order."""
    return [packet for packet in container.demux(container.streams.video[0]) if packet.size]


def video_info(container: InputContainer, frames: int) -> VideoInfo:
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    if frames < 1:
        raise BadSample("video_without_frames", "the video stream holds no frames")
    if not rate or not stream.height or not stream.width:
        raise BadSample("unreadable_video", "the video stream has no frame rate or no size")
    if stream.height * stream.width > MAX_DECODED_PIXELS:
        raise BadSample("image_too_large", f"frames of {stream.width}x{stream.height} pixels")
    return VideoInfo(frames, float(rate), float(Fraction(frames) / rate), stream.height, stream.width)
