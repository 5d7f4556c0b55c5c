"""Which frames of a video the model sees, and the times that are written after them.

The reference is transformers' video processor and processor of the model:

    model                 classes            frames                                            after a frame pair
    GLM-4.5V, GLM-4.1V    Glm4v...           2 per second, at most 600                         1
    GLM-4.6V, -Flash      Glm46V...          6 per second up to 30 s, 2 up to 300 s, then 1,   1.0 seconds
                                             at most 640

Longer videos are sampled evenly over their whole length. The number of frames is made even, and every two neighbours
are one frame pair with one time, that of its first frame. Where the rate of a video is not constant, frames and times
follow the true times of its frames.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import BadSample
from data_pipeline.media.image_sizes import grid_of, resized_size
from data_pipeline.media.pixel_budget import TEMPORAL_PATCH_SIZE
from data_pipeline.media.video_files import VideoInfo

SAMPLED_FPS = 2
MAX_DURATION = 300  # seconds; a longer video is sampled MAX_DURATION * SAMPLED_FPS times

# GLM-4.6V: (longest duration in seconds, frame pairs per second). Nothing after the last duration adds frames.
_PAIR_RATES = ((30, 3.0), (300, 1.0), (2400, 0.5))
_MAX_FRAMES = 640


@dataclass(frozen=True)
class VideoForm:
    """How one generation of models sees videos."""

    name: str
    sampled_frames: Callable[[VideoInfo], list[int]]  # in order, an even number; the last one may be repeated
    seconds: Callable[[float], float]  # what of a frame's time is kept
    timestamp: str  # how it is written


@dataclass(frozen=True)
class VideoGeometry:
    """How the model sees a video."""

    indices: tuple[int, ...]  # the sampled frames, an even number
    seconds: tuple[float, ...]  # of the first frame of each frame pair; whole ones in GLM-4.5V's form
    timestamps: tuple[str, ...]  # one per frame pair, written after it
    size: tuple[int, int]  # (H, W) pixels

    @property
    def grid(self) -> tuple[int, int]:
        """The (h, w) patches of every frame pair."""
        return grid_of(self.size)


def frame_indices(frames: int, fps: float, duration: float | None) -> list[int]:
    """Return the frames that GLM-4.5V sees of a video with a constant rate."""
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
    return _even(chosen)


def _frames_of_glm45v(info: VideoInfo) -> list[int]:
    """Return what GLM-4.5V sees: the frames of `frame_indices`, or by the frames' times if the video has them."""
    if not info.times:
        return frame_indices(info.frames, info.fps, info.duration)
    if info.duration <= MAX_DURATION:
        moments = [i / SAMPLED_FPS for i in range(max(math.floor(info.duration * SAMPLED_FPS), 1))]
    elif info.frames <= MAX_DURATION * SAMPLED_FPS:
        return _even(list(range(info.frames)))
    else:
        moments = np.linspace(0, info.duration, MAX_DURATION * SAMPLED_FPS, endpoint=True).tolist()
    return _even([min(info.frames - 1, bisect_left(info.times, moment)) for moment in moments])


def _frames_of_glm46v(info: VideoInfo) -> list[int]:
    """Return what GLM-4.6V sees: the longer the video, the fewer frames per second. Empty below a sixth of a second."""
    duration = info.duration or round((info.frames - 1) / info.fps) + 1
    counted = min(duration, _PAIR_RATES[-1][0])
    rate = TEMPORAL_PATCH_SIZE * next(pairs for longest, pairs in _PAIR_RATES if counted <= longest)
    wanted = min(int(counted * rate), _MAX_FRAMES)
    first, last = 0, info.frames - 1
    chosen: list[int] = []
    if info.frames >= wanted:
        chosen = _first_frames_from(info, 1 / rate, int(duration))
        if len(chosen) < wanted:
            first, last = chosen[0], chosen[-1]
    if len(chosen) != wanted:
        chosen = np.linspace(first, last, wanted, dtype=int).tolist()
    return _even(chosen)


def _first_frames_from(info: VideoInfo, interval: float, end: int) -> list[int]:
    """Return the first frame from each moment on, none twice. Moments are `interval` apart, and below `end`."""
    duration_per_frame = 1 / info.fps
    chosen: list[int] = []
    moment, frame = 0.0, 0
    while True:
        if info.times:
            frame = bisect_left(info.times, moment, frame)
        else:
            frame = bisect_left(range(info.frames), moment, frame, key=lambda number: number * duration_per_frame)
        if frame == info.frames:
            return chosen
        chosen.append(frame)
        moment += interval
        frame += 1
        if moment >= end:
            return chosen


def _even(chosen: list[int]) -> list[int]:
    unique = list(dict.fromkeys(chosen))
    return unique + unique[-1:] if len(unique) % 2 else unique


VIDEO_FORMS = {
    form.name: form
    for form in (
        VideoForm("glm45v", _frames_of_glm45v, seconds=int, timestamp="{}"),
        VideoForm("glm46v", _frames_of_glm46v, seconds=float, timestamp="{:.1f} seconds"),
    )
}
GLM45V_VIDEO = VIDEO_FORMS["glm45v"]


def video_geometry(info: VideoInfo, max_tokens: int, form: VideoForm = GLM45V_VIDEO) -> VideoGeometry:
    """Choose frames, timestamps and size from the header alone.

    Raises:
        BadSample: `extreme_aspect`; `video_too_short`, if the form takes no frame of it.
    """
    indices = form.sampled_frames(info)
    if not indices:
        raise BadSample("video_too_short", f"the model sees no frame of a video of {info.duration:.3f} seconds")
    seconds = tuple(
        form.seconds(info.times[index] if info.times else index / info.fps) for index in indices[::TEMPORAL_PATCH_SIZE]
    )
    size = resized_size(info.height, info.width, max_tokens=max_tokens, frames=len(indices))
    return VideoGeometry(tuple(indices), seconds, tuple(map(form.timestamp.format, seconds)), size)
