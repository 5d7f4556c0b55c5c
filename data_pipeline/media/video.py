"""Videos: which frames the model sees, when, at which size, and their patches.

The reference is transformers' `Glm4vVideoProcessor` reading files with PyAV: two frames per second (at most 600, spread
over a video longer than five minutes), an even number of them, every two neighbours one frame pair with one timestamp.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from data_pipeline.errors import BadSample
from data_pipeline.media.image_sizes import grid_of, resized_size
from data_pipeline.media.images import as_frames, patchify, resize
from data_pipeline.media.pixel_budget import MAX_DECODED_PIXELS, SLICE_BYTES, TEMPORAL_PATCH_SIZE
from data_pipeline.media.video_frames import decode_frames

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
    with _open(data) as container:
        frames = container.streams.video[0].frames
        return _info(container, frames or len(_packets(container)))


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


def video_patches(data: bytes, max_tokens: int) -> tuple[torch.Tensor, VideoGeometry]:
    """Return a video's slices, uint8 [pairs*h*w*2, 588], and its geometry.

    Raises:
        BadSample: The video cannot be decoded up to the last sampled frame, is too large or too narrow.
    """
    with _open(data) as container:
        packets = _packets(container)
        info = _info(container, container.streams.video[0].frames or len(packets))
        geometry = video_geometry(info, max_tokens)
        return _decode(packets, info, geometry), geometry


def _decode(packets: Sequence[av.Packet], info: VideoInfo, geometry: VideoGeometry) -> torch.Tensor:
    """Return the slices of the sampled frames. Only these are converted and resized, and one is held at a time."""
    h, w = geometry.grid
    slices = torch.empty(len(geometry.seconds), h * w, TEMPORAL_PATCH_SIZE, SLICE_BYTES, dtype=torch.uint8)
    wanted = sorted(set(geometry.indices))
    missing = set(wanted)
    # One converter for the video, without threads: making one for every frame, as frame.to_ndarray does, takes longer
    # than the conversion, and gives the same pixels.
    converter = VideoReformatter()
    try:
        for index, frame in decode_frames(packets, wanted):
            if (frame.height, frame.width) != (info.height, info.width):
                header = f"{info.width}x{info.height}"
                raise BadSample(
                    "unreadable_video", f"frame {index} is {frame.width}x{frame.height}, but the header says {header}"
                )
            rgb = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            patches = patchify(resize(as_frames(rgb), geometry.size))
            for position in range(geometry.indices.index(index), len(geometry.indices)):
                if geometry.indices[position] != index:  # the last frame may be sampled twice
                    break
                slices[position // TEMPORAL_PATCH_SIZE, :, position % TEMPORAL_PATCH_SIZE] = patches
            missing.discard(index)
    except BadSample:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        raise BadSample("unreadable_video", str(error)) from error
    if len(missing) == len(wanted):
        raise BadSample("video_without_frames", "no frame could be decoded")
    if missing:
        raise BadSample(
            "unreadable_video", f"{len(missing)} of {len(wanted)} frames are missing: the video is cut short"
        )
    return slices.reshape(-1, SLICE_BYTES)


@contextmanager
def _open(data: bytes) -> Iterator[InputContainer]:
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


def _packets(container: InputContainer) -> list[av.Packet]:
    """Return the packets of the video stream in decoding order."""
    return [packet for packet in container.demux(container.streams.video[0]) if packet.size]


def _info(container: InputContainer, frames: int) -> VideoInfo:
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    if frames < 1:
        raise BadSample("video_without_frames", "the video stream holds no frames")
    if not rate or not stream.height or not stream.width:
        raise BadSample("unreadable_video", "the video stream has no frame rate or no size")
    if stream.height * stream.width > MAX_DECODED_PIXELS:
        raise BadSample("image_too_large", f"frames of {stream.width}x{stream.height} pixels")
    return VideoInfo(frames, float(rate), float(Fraction(frames) / rate), stream.height, stream.width)
