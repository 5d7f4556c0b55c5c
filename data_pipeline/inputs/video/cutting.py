"""Parts of a clip, exact to the frame.

A copied stream can only begin at a key frame, so segments are encoded anew: H.264 at a constant quality,
frames as large and as far apart in time as they were, no sound. The clip is decoded once, in
order, however many segments there are and however they overlap.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av

from data_pipeline.errors import BadSample

Span = tuple[float, float]  # [start, end) in seconds from the clip's first frame
# bf: frames in the order in which they are shown. mbtree: its assembly reads memory that nobody has written, so that
# once in a hundred times the same clip came out in other bytes (x264 core 165; MALLOC_PERTURB_=1 shows it).
OPTIONS = {"crf": "16", "preset": "veryfast", "bf": "0", "mbtree": "0"}


def cut_clip(data: bytes, spans: Sequence[Span]) -> Iterator[bytes | BadSample]:
    """The MP4 of each span in the order given, which must be by start; BadSample for a span without frames.

    A frame belongs to a span if it is first shown in it. Raises BadSample if the clip cannot be decoded.
    """
    segments = [_Segment(span) for span in spans]
    next_out = 0
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            first: Fraction | None = None
            for frame in container.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    continue
                shown = frame.pts * frame.time_base
                first = shown if first is None else first
                for segment in segments[next_out:]:
                    segment.take(frame, shown - first, stream)
                while next_out < len(segments) and shown - first >= segments[next_out].end:
                    yield segments[next_out].finish()
                    next_out += 1
                if next_out == len(segments):
                    return
    except (av.error.FFmpegError, IndexError) as error:
        raise BadSample("unreadable_video", str(error)) from error
    for segment in segments[next_out:]:
        yield segment.finish()


class _Segment:
    """One part on its way: opened at its first frame."""

    def __init__(self, span: Span):
        self.start, self.end = span
        self._buffer = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None
        self._first_pts = 0

    def take(self, frame: av.VideoFrame, shown: Fraction, source: Any) -> None:
        if not self.start <= shown < self.end:
            return
        assert frame.pts is not None
        if self._container is None:
            self._open(frame, source)
            self._first_pts = frame.pts
        # Where nothing has to be converted this is the very frame, which other segments need as it was.
        converted = frame.reformat(self._stream.width, self._stream.height, self._stream.pix_fmt)
        pts, converted.pts = frame.pts, frame.pts - self._first_pts
        converted.time_base = frame.time_base
        converted.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses its own key frames
        self._container.mux(self._stream.encode(converted))
        frame.pts = pts

    def finish(self) -> bytes | BadSample:
        if self._container is None:
            said = f"no frame is first shown from {self.start:g} to {self.end:g} seconds"
            return BadSample("video_without_frames", said)
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()

    def _open(self, frame: av.VideoFrame, source: Any) -> None:
        self._container = av.open(self._buffer, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=source.average_rate or source.guessed_rate)
        self._stream.width, self._stream.height = frame.width, frame.height
        # Colour at half the resolution, as everywhere, needs even sides.
        self._stream.pix_fmt = "yuv444p" if frame.width % 2 or frame.height % 2 else "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = frame.time_base
        self._stream.codec_context.thread_count = 1  # the same bytes on every machine
        self._stream.options = OPTIONS
