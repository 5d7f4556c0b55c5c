"""Clips cut out of a video, exact to the frame.

A copied stream can only begin at a key frame, so clips are encoded again: H.264 at a constant quality, with the size
and the times of the original frames, without sound. The video is decoded once, in order, for any number of clips, which
may overlap.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av

from data_pipeline.errors import BadSample
from data_pipeline.media.video_files import open_video, video_stream

Span = tuple[float, float]  # [start, end) in seconds from the first frame of the video
# bf=0: frames are stored in the order in which they are shown. mbtree=0: its assembly code reads uninitialised memory,
# so that one run in a hundred gave other bytes for the same clip (x264 core 165; MALLOC_PERTURB_=1 shows it).
OPTIONS = {"crf": "16", "preset": "veryfast", "bf": "0", "mbtree": "0"}


def cut_clips(data: bytes, spans: Sequence[Span]) -> Iterator[bytes | BadSample]:
    """Yield the clip of each span as an MP4 file; a BadSample for a span without frames.

    A frame belongs to a span if its first moment on screen is inside the span.

    Args:
        data: The video file.
        spans: Sorted by start.

    Raises:
        BadSample: unreadable_video.
    """
    clips = [_Clip(span) for span in spans]
    next_out = 0
    try:
        with open_video(data) as container:
            stream = video_stream(container)
            first: Fraction | None = None
            for frame in container.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    continue
                shown = frame.pts * frame.time_base
                first = shown if first is None else first
                for clip in clips[next_out:]:
                    clip.take(frame, shown - first, stream)
                while next_out < len(clips) and shown - first >= clips[next_out].end:
                    yield clips[next_out].finish()
                    next_out += 1
                if next_out == len(clips):
                    return
    except (av.error.FFmpegError, IndexError) as error:
        raise BadSample("unreadable_video", str(error)) from error
    for clip in clips[next_out:]:
        yield clip.finish()


class _Clip:
    """A clip that is being written. Its file is opened at its first frame."""

    def __init__(self, span: Span) -> None:
        self.start, self.end = span
        self._buffer = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None
        self._first_pts = 0

    def take(self, frame: av.VideoFrame, shown: Fraction, source: Any) -> None:
        """Encode a frame if it belongs to the clip.

        Args:
            frame: The decoded frame.
            shown: Its time, in seconds from the first frame of the video.
            source: The stream that it was decoded from.
        """
        if not self.start <= shown < self.end:
            return
        assert frame.pts is not None
        if self._container is None:
            self._open(frame, source)
            self._first_pts = frame.pts
        # If nothing has to be converted this is the same frame, which other clips need unchanged.
        converted = frame.reformat(self._stream.width, self._stream.height, self._stream.pix_fmt)
        pts, converted.pts = frame.pts, frame.pts - self._first_pts
        converted.time_base = frame.time_base
        converted.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses the key frames
        self._container.mux(self._stream.encode(converted))
        frame.pts = pts

    def finish(self) -> bytes | BadSample:
        """Return the MP4 file, or a BadSample if the clip has no frames."""
        if self._container is None:
            detail = f"no frame is first shown from {self.start:g} to {self.end:g} seconds"
            return BadSample("video_without_frames", detail)
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()

    def _open(self, frame: av.VideoFrame, source: Any) -> None:
        self._container = av.open(self._buffer, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=source.average_rate or source.guessed_rate)
        self._stream.width, self._stream.height = frame.width, frame.height
        # Colour at half the resolution, the usual choice, needs even sides.
        self._stream.pix_fmt = "yuv444p" if frame.width % 2 or frame.height % 2 else "yuv420p"
        self._stream.set_display_rotation(frame.rotation)  # the pixels stay as they are stored
        self._stream.time_base = self._stream.codec_context.time_base = frame.time_base
        self._stream.codec_context.thread_count = 1  # the same bytes on every machine
        self._stream.options = OPTIONS
