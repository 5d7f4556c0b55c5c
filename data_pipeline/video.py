"""Clips: which frames are looked at, when, at which size, and their patches.

The reference is transformers' `Glm4vVideoProcessor` reading files with PyAV: two frames a second (at most 600, spread
over a clip longer than five minutes), an even number of them, every two neighbours one frame pair with one timestamp.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from data_pipeline.errors import BadSample
from data_pipeline.images import MAX_DECODED_PIXELS, TEMPORAL_PATCH_SIZE, grid_of, patchify, resize, resized_size

SAMPLED_FPS = 2
MAX_DURATION = 300  # seconds; a longer clip is sampled MAX_DURATION * SAMPLED_FPS times in all


@dataclass(frozen=True)
class VideoInfo:
    """What the container says: enough to know a clip's frames, timestamps and tokens without decoding it."""

    frames: int
    fps: float
    duration: float  # seconds
    height: int
    width: int


@dataclass(frozen=True)
class VideoLayout:
    """How a clip is shown to the model."""

    indices: tuple[int, ...]  # the frames looked at, an even number
    seconds: tuple[int, ...]  # one whole second a frame pair, written after it
    size: tuple[int, int]  # (H, W) pixels

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches of every frame pair."""
        return grid_of(self.size)


def probe_video(data: bytes) -> VideoInfo:
    """Reads the container's header (and counts packets where the header does not say). Raises BadSample."""
    with _open(data) as container:
        stream = _stream(container)
        rate = stream.average_rate or stream.guessed_rate
        frames = stream.frames or _count_packets(container)
        if frames < 1:
            raise BadSample("video_without_frames", "the video stream holds no frames")
        if not rate or not stream.height or not stream.width:
            raise BadSample("unreadable_video", "the video stream has no frame rate or no size")
        if stream.height * stream.width > MAX_DECODED_PIXELS:
            raise BadSample("image_too_large", f"frames of {stream.width}x{stream.height} pixels")
        return VideoInfo(frames, float(rate), float(Fraction(frames) / rate), stream.height, stream.width)


def frame_indices(frames: int, fps: float, duration: float | None) -> list[int]:
    """Indices of the frames to look at, in order, an even number of them (the last one may be given twice)."""
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


def plan_video(info: VideoInfo, max_tokens: int) -> VideoLayout:
    """Chooses frames, timestamps and size from the header alone. Raises BadSample for an extreme aspect."""
    indices = frame_indices(info.frames, info.fps, info.duration)
    seconds = tuple(int(index / info.fps) for index in indices[::TEMPORAL_PATCH_SIZE])
    size = resized_size(info.height, info.width, max_tokens=max_tokens, frames=len(indices))
    return VideoLayout(tuple(indices), seconds, size)


def video_slices(data: bytes, max_tokens: int) -> tuple[torch.Tensor, VideoLayout]:
    """A clip's bytes -> (slices uint8 [pairs*h*w*2, 588], its layout). Raises BadSample.

    Decodes in order up to the last frame needed and keeps only resized ones: seeking to every frame is slower.
    """
    info = probe_video(data)
    layout = plan_video(info, max_tokens)
    wanted = set(layout.indices)
    resized: dict[int, torch.Tensor] = {}
    # One converter for the clip, without threads: making one for every frame, as frame.to_ndarray does, takes longer
    # than the conversion, and gives the same pixels.
    converter = VideoReformatter()
    with _open(data) as container:
        try:
            for index, frame in enumerate(container.decode(_stream(container))):
                if index in wanted:
                    rgb = (
                        torch.from_numpy(converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
                        .permute(2, 0, 1)
                        .contiguous()
                    )
                    if rgb.shape[1:] != (info.height, info.width):
                        raise BadSample(
                            "unreadable_video",
                            f"frame {index} is {rgb.shape[2]}x{rgb.shape[1]}, not "
                            f"{info.width}x{info.height} as the container says",
                        )
                    resized[index] = resize(rgb[None], layout.size)
                if index >= layout.indices[-1]:
                    break
        except (av.error.FFmpegError, ValueError) as error:
            if isinstance(error, BadSample):
                raise
            raise BadSample("unreadable_video", str(error)) from error
    if not resized:
        raise BadSample("video_without_frames", "not one frame could be decoded")
    if len(resized) < len(wanted):
        missing = len(wanted) - len(resized)
        raise BadSample("unreadable_video", f"{missing} of {len(wanted)} frames are missing: the clip is cut short")
    pairs = zip(layout.indices[::2], layout.indices[1::2], strict=True)
    return torch.cat([patchify(torch.cat([resized[first], resized[second]])) for first, second in pairs]), layout


def _open(data: bytes):
    try:
        return av.open(io.BytesIO(data))
    except (av.error.FFmpegError, ValueError) as error:
        raise BadSample("unreadable_video", f"not a video ({len(data)} bytes): {error}") from error


def _stream(container):
    if not container.streams.video:
        raise BadSample("video_without_frames", "the file has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadSample("unreadable_video", "no decoder for its codec")
    return stream


def _count_packets(container) -> int:
    return sum(packet.size > 0 for packet in container.demux(_stream(container)))
