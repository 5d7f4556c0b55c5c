"""Clips as filters see them: whether they decode to their end, and small grey frames of them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipeline.errors import BadSample
from data_pipeline.media.video import probe_video

THUMBNAIL_SIZE = 64  # pixels each way: twice what a perceptual hash looks at
THUMBNAILS_PER_SECOND = 2


@dataclass(frozen=True)
class Thumbnails:
    """frames: uint8 [n, 64, 64], grey, two a second, the first frame of the clip first. seconds: its duration."""

    frames: np.ndarray
    seconds: float


def read_thumbnails(data: bytes) -> Thumbnails:
    """Decodes every frame of a clip. Raises BadSample if it breaks off, or has fewer frames than it says."""
    info = probe_video(data)
    step = max(info.fps / THUMBNAILS_PER_SECOND, 1.0)
    thumbnails: list[np.ndarray] = []
    converter = VideoReformatter()
    decoded = 0
    try:
        with av.open(io.BytesIO(data), "r") as container:
            for frame in container.decode(video=0):
                if decoded >= len(thumbnails) * step:
                    small = converter.reformat(
                        frame, THUMBNAIL_SIZE, THUMBNAIL_SIZE, format="gray", interpolation="AREA", threads=1
                    )
                    thumbnails.append(small.to_ndarray())
                decoded += 1
    except (av.error.FFmpegError, ValueError) as error:
        raise BadSample("unreadable_video", f"after {decoded} of {info.frames} frames: {error}") from error
    if decoded < info.frames:
        raise BadSample(
            "unreadable_video", f"{decoded} of {info.frames} frames could be decoded: the clip is cut short"
        )
    return Thumbnails(np.stack(thumbnails), info.duration)


def frozen_share(frames: np.ndarray, tolerance: float) -> float:
    """Of the steps from one thumbnail to the next, the share whose mean change is at most `tolerance` grey levels."""
    if len(frames) < 2:
        return 0.0
    change = np.abs(frames[1:].astype(np.int16) - frames[:-1]).mean(axis=(1, 2))
    return float((change <= tolerance).mean())


def black_share(frames: np.ndarray, level: float) -> float:
    """Share of thumbnails whose mean grey level is at most `level` of 255."""
    return float((frames.mean(axis=(1, 2)) <= level).mean())
