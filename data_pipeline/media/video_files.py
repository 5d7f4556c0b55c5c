"""Videos as files: opening them, and what they say of their frames. video_sampling.py chooses from these.

The reference is transformers reading files with torchcodec: frames are the packets that are shown, in the order of
their times; the duration is the time from the first frame to the end of the last one; the rate is frames / duration.

transformers takes every rate for constant: frame n is shown after n / fps seconds. Where this is wrong, the true times
are kept:

    frames shown at 0.00 0.04 ... 1.96 12.00 22.00    52 frames in 22.04 seconds, fps 2.36
    by n / fps      50 is taken for second 21.2
    by times        50 is second 12
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from data_pipeline.errors import BadSample
from data_pipeline.media.pixel_budget import MAX_DECODED_PIXELS

_EQUAL_SIZES = re.compile(rb"stsz\0{4}(.{4})(.{4})", re.DOTALL)  # bytes of each frame (0: a table follows), frames

# FFmpeg knows other formats, but some of them are lists of addresses to fetch (HLS, concat) and not videos.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"

# A frame may be shown this many seconds from number / fps, and one frame at most: the rate is constant then.
RATE_TOLERANCE = 0.1

_MOV = "mov,mp4,m4a,3gp,3g2,mj2"
_UPRIGHT = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0"  # the beginning of a matrix that turns nothing
_MATROSKA_CLUSTER, _MATROSKA_PROJECTION = b"\x1f\x43\xb6\x75", b"\x76\x70"


@dataclass(frozen=True)
class VideoInfo:
    """What the container says: enough to know a video's frames, timestamps and tokens without decoding it."""

    frames: int
    fps: float  # frames / duration
    duration: float  # seconds, from the first frame to the end of the last one
    height: int  # pixels, upright
    width: int  # pixels, upright
    quarter_turns: int = 0  # counter-clockwise, from the stored frames to upright ones: 0 to 3
    times: tuple[float, ...] = ()  # seconds of each frame from the first one; empty: number / fps


def probe_video(data: bytes) -> VideoInfo:
    """Read the container's header, and the times of packets if the header does not give them.

    Raises:
        BadSample: The header cannot be read, has no video stream, or its frames are too large.
    """
    with open_video(data) as container:
        return video_info(container, data)


@contextmanager
def open_video(data: bytes) -> Iterator[InputContainer]:
    """Open a container with a video stream that can be decoded. Errors while it is open become BadSample."""
    _check_sample_table(data)
    try:
        with av.open(io.BytesIO(data), "r", options={"format_whitelist": CONTAINERS}) as container:
            stream = video_stream(container)
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


def video_stream(container: InputContainer) -> av.VideoStream:
    """Return the video stream that FFmpeg takes for the main one. Cover art and other attached images are none.

    Raises:
        BadSample: video_without_frames.
    """
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        kind = "but attached images (cover art)" if container.streams.video else "at all"
        raise BadSample("video_without_frames", f"the file has no video stream {kind}")
    best = container.streams.best("video")
    return next((stream for stream in moving if best and stream.index == best.index), moving[0])


def video_packets(container: InputContainer) -> list[av.Packet]:
    """Return the packets of the video stream in decoding order. Empty ones, which repeat a frame, are none."""
    return [packet for packet in container.demux(video_stream(container)) if packet.size]


def video_info(container: InputContainer, data: bytes, packets: Sequence[av.Packet] | None = None) -> VideoInfo:
    """Return what a file says of its video.

    Args:
        container: The open file.
        data: The file.
        packets: Its `video_packets`; None: they are read if the header is not enough.

    Raises:
        BadSample: video_without_frames, unreadable_video or image_too_large.
    """
    stream = video_stream(container)
    if not stream.height or not stream.width:
        raise BadSample("unreadable_video", "the video stream has no size")
    if stream.height * stream.width > MAX_DECODED_PIXELS:
        raise BadSample("image_too_large", f"frames of {stream.width}x{stream.height} pixels")
    timing = _timing_in_header(stream)
    if timing is None:
        packets = video_packets(container) if packets is None else packets
        timing = _timing(_spans_of(packets), stream)
    frames, fps, duration, times = timing
    quarter_turns = 0
    if _may_be_turned(container, data):
        quarter_turns = _quarter_turns(stream, container.demux(stream) if packets is None else packets)
    height, width = (stream.width, stream.height) if quarter_turns % 2 else (stream.height, stream.width)
    return VideoInfo(frames, fps, duration, height, width, quarter_turns, times)


Timing = tuple[int, float, float, tuple[float, ...]]  # frames, fps, duration and times, as in VideoInfo
Span = tuple[int | None, int]  # when a frame is shown and for how long, in ticks of its stream


def _spans_of(packets: Iterable[av.Packet]) -> list[Span]:
    """Return the spans of the frames that are shown, in no order. Packets that an edit list hides are none."""
    return [
        (packet.dts if packet.pts is None else packet.pts, packet.duration or 0)
        for packet in packets
        if not packet.is_discard
    ]


def _timing_in_header(stream: av.VideoStream) -> Timing | None:
    """Return the timing of an MP4 whose sample table says that the rate is constant; None for all others.

    The table has the times of decoding. If these are at a constant rate, the same frames are shown at that rate.
    """
    if stream.container.format.name != _MOV or stream.start_time is None or stream.time_base is None:
        return None
    times = [entry.timestamp for entry in stream.index_entries if entry.size and not entry.is_discard]
    frames = len(times)
    if not frames or not frames == stream.frames == len(stream.index_entries) or not stream.duration:
        return None
    step = stream.duration // frames
    if not step or stream.duration != step * frames or (np.diff(np.array(times)) != step).any():
        return None
    first, end = (
        _seconds(ticks, stream.time_base) for ticks in (stream.start_time, stream.start_time + stream.duration)
    )
    return frames, frames / (end - first), end - first, ()


def _timing(spans: Sequence[Span], stream: av.VideoStream) -> Timing:
    """Return the timing of frames.

    Raises:
        BadSample: video_without_frames or unreadable_video.
    """
    if not spans:
        raise BadSample("video_without_frames", "the video stream holds no frames")
    known = sorted((start, length) for start, length in spans if start is not None)
    rate, base = stream.average_rate or stream.guessed_rate, stream.time_base
    if len(known) == len(spans) and base is not None:
        first = _seconds(known[0][0], base)
        duration = _seconds(max(start + length for start, length in known), base) - first
        if duration > 0:
            fps = len(known) / duration
            times = tuple(_seconds(start - known[0][0], base) for start, _ in known)  # exact, not 2.3 - 0.3 = 1.999...
            tolerance = min(1 / fps, RATE_TOLERANCE) + _seconds(1, base)
            steady = all(abs(time - number / fps) <= tolerance for number, time in enumerate(times))
            return len(known), fps, duration, () if steady else times
    if not rate:
        raise BadSample("unreadable_video", "the video stream has no frame rate and no times")
    return len(spans), float(rate), float(len(spans) / rate), ()


def _seconds(ticks: int, base: Fraction) -> float:
    """Return a time in seconds, with the arithmetic of torchcodec."""
    return ticks * base.numerator / base.denominator


def _may_be_turned(container: InputContainer, data: bytes) -> bool:
    """Check whether the header has a matrix by which frames may have to be turned."""
    if container.format.name == _MOV:
        header = _movie_header(data)
        matrices = (header[at.start() : at.start() + 100] for at in re.finditer(b"mvhd|tkhd", header))
        return any(_UPRIGHT not in matrix for matrix in matrices)
    return container.format.name == "matroska,webm" and _MATROSKA_PROJECTION in data[: data.find(_MATROSKA_CLUSTER)]


def _movie_header(data: bytes) -> bytes:
    """Return the box `moov` of an MP4; all of the file if its boxes cannot be followed."""
    at = 0
    while 0 <= at <= len(data) - 16:
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        size = int.from_bytes(data[at + 8 : at + 16]) if size == 1 else size
        if kind == b"moov":
            return data[at : at + size] if size else data[at:]
        if size < 8:
            break
        at += size
    return data


def _quarter_turns(stream: av.VideoStream, packets: Iterable[av.Packet]) -> int:
    """Decode one frame, which carries the matrix of its stream, and return its angle in quarters of a turn."""
    decoder: Any = stream.codec_context
    try:
        # None: returns what the decoder still holds, which is all of a video of a few frames.
        for packet in chain((packet for packet in packets if packet.size), [None]):
            for frame in decoder.decode(packet):
                return round(frame.rotation / 90) % 4
        return 0
    finally:
        decoder.flush_buffers()
