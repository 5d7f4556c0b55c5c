"""Small grey frames of a video, and a check that it decodes completely."""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipeline.errors import BadSample
from data_pipeline.media.video_files import open_video, probe_video, video_stream

THUMBNAIL_SIZE = 64  # pixels per side: twice the input of a perceptual hash
THUMBNAILS_PER_SECOND = 2


@dataclass(frozen=True)
class Thumbnails:
    """Frames of one video at regular times."""

    frames: np.ndarray  # uint8 [n, 64, 64], grey, THUMBNAILS_PER_SECOND, from the first frame on
    seconds: float  # duration of the video


def read_thumbnails(data: bytes) -> Thumbnails:
    """Decode every frame of a video and return some of them.

    Raises:
        BadSample: unreadable_video, if a frame cannot be decoded or there are fewer than the container says.
    """
    info = probe_video(data)
    step = max(info.fps / THUMBNAILS_PER_SECOND, 1.0)
    thumbnails: list[np.ndarray] = []
    converter = VideoReformatter()
    decoded = 0
    try:
        with open_video(data) as container:
            for frame in container.decode(video_stream(container)):
                if decoded >= len(thumbnails) * step:
                    small = converter.reformat(
                        frame, THUMBNAIL_SIZE, THUMBNAIL_SIZE, format="gray", interpolation="AREA", threads=1
                    )
                    thumbnails.append(small.to_ndarray())
                decoded += 1
    except (av.error.FFmpegError, ValueError) as error:
        raise BadSample("unreadable_video", f"after {decoded} of {info.frames} frames: {error}") from error
    if decoded < info.frames:
        raise BadSample("unreadable_video", f"only {decoded} of {info.frames} frames decode: the file is cut off")
    return Thumbnails(np.stack(thumbnails), info.duration)


def frozen_share(frames: np.ndarray, tolerance: float) -> float:
    """Return the share of steps between thumbnails whose mean change is at most `tolerance` grey levels."""
    if len(frames) < 2:
        return 0.0
    change = np.abs(frames[1:].astype(np.int16) - frames[:-1]).mean(axis=(1, 2))
    return float((change <= tolerance).mean())


def black_share(frames: np.ndarray, level: float) -> float:
    """Return the share of thumbnails whose mean grey level is at most `level` of 255."""
    return float((frames.mean(axis=(1, 2)) <= level).mean())
