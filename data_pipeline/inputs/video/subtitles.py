"""Subtitle files, SubRip (.srt) and WebVTT (.vtt), read with FFmpeg."""

from __future__ import annotations

import html
import io
import re

import av

from data_pipeline.errors import BadSample

FORMATS = {".srt": "srt", ".vtt": "webvtt"}  # suffix -> FFmpeg's name of the format
_MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")  # <i>, <c.yellow>, <00:00:01.000>, {\an8}


def read_subtitles(data: bytes, suffix: str) -> list[dict[str, float | str]]:
    """Return the cues of a file in order, without markup: [{"start": seconds, "end": seconds, "text": str}, ...].

    A cue whose end is not after its start is returned unchanged. Cues without text are skipped.

    Args:
        data: The subtitle file.
        suffix: A key of FORMATS.

    Raises:
        BadSample: bad_subtitles.
    """
    cues: list[dict[str, float | str]] = []
    try:
        data.decode("utf-8")
        with av.open(io.BytesIO(data), "r", format=FORMATS[suffix]) as container:
            for packet in container.demux():
                if packet.pts is None or packet.time_base is None:  # the end of the file
                    continue
                start, end = packet.pts * packet.time_base, (packet.pts + (packet.duration or 0)) * packet.time_base
                text = html.unescape(_MARKUP.sub("", bytes(packet).decode("utf-8")))
                if text.strip():
                    cues.append({"start": float(start), "end": float(end), "text": text})
    except (av.error.FFmpegError, ValueError) as error:
        raise BadSample("bad_subtitles", f"not {FORMATS[suffix]} in UTF-8: {error}") from error
    return cues
