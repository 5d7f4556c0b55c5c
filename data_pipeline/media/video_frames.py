"""Frames of a clip by number, decoding no packet that they do not need.

Packets stand in the order of decoding; frames are numbered in the order of showing, by their times. A key frame and
what follows it up to the next one is a group: it is decoded from its start, or not at all. Wanted here: 2 and 7.

    I0 P3 B1 B2 P5 B4 | I6 P9 B7 B8 | I10 ...      packets (the number is the frame's)
    +  +  -  +  .  .    +  +  +  .    .

A group is decoded up to its last wanted packet (+). Of those, H.264's packets that no other one refers to (B1) are
left out by the decoder itself (-). A group may be open: frames that follow its key frame but are shown before it refer
to the group before; where one of them is wanted, that group is decoded whole first.

The frames are those of decoding everything in order, byte for byte. Where the stream does not say enough to be sure of
that (no times, other codecs and containers, a frame that does not come), everything is decoded in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import av

from data_pipeline.errors import BadSample

# Codecs of which a packet is one frame, with a time of its own, and a key frame a place to start from.
SELECTIVE_CODECS = ("h264", "hevc", "vp9", "av1")
# Containers that say when a packet's frame is shown. (AVI does not: FFmpeg makes times up, in the order of decoding.)
TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")

MAX_CLIP_PIXELS = 200_000_000_000  # that one clip may make us decode: half an hour of 1080p, some ten minutes of a core


@dataclass(frozen=True)
class Run:
    """Packets start..stop-1, to be decoded one after the other from a key frame; numbers: the wanted frames by their
    times."""

    start: int
    stop: int
    numbers: dict[int, int]


def choose_runs(packets: Sequence[av.Packet], wanted: Sequence[int]) -> list[Run] | None:
    """What to decode for the frames `wanted` (rising, not empty) of a clip; None where only all of it will do."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(set(times)) < len(packets) or min(times) < times[0] or not packets[0].is_keyframe:
        return None
    # Packets that an edit list sets aside are decoded, as others may refer to them, but not shown.
    shown = sorted((at for at, packet in enumerate(packets) if not packet.is_discard), key=lambda at: times[at])
    if wanted[-1] >= len(shown):
        return None

    keys = [at for at, packet in enumerate(packets) if packet.is_keyframe]
    runs: list[Run] = []
    for at, number in sorted((shown[number], number) for number in wanted):
        group = bisect_right(keys, at) - 1
        leading = times[at] < times[keys[group]]
        run = Run(keys[group - leading], at + 1, {times[at]: number})
        while runs and run.start < runs[-1].stop:
            last = runs.pop()
            run = Run(min(last.start, run.start), run.stop, last.numbers | run.numbers)
        runs.append(run)
    return runs


def decode_frames(packets: Sequence[av.Packet], wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """All packets of a video stream -> (number, frame) for the frames `wanted` (rising, not empty), as they come.

    A frame may come twice, those that the clip does not hold do not come. Raises FFmpegError for what cannot be
    decoded, BadSample if decoding would take unreasonably long.
    """
    if not packets:
        return
    decoder = packets[0].stream.codec_context
    runs = choose_runs(packets, wanted) if _says_enough(packets) else None
    missing = set(wanted)
    if runs is not None:
        _check_work(decoder, sum(run.stop - run.start for run in runs))
        with suppress(av.error.FFmpegError):  # whether it matters shows in order
            for run in runs:
                for number, frame in _decode_run(decoder, packets, run):
                    missing.discard(number)
                    yield number, frame
                if not missing.isdisjoint(run.numbers.values()):
                    break
        decoder.flush_buffers()
    if missing:
        _check_work(decoder, min(len(packets), wanted[-1] + 1))
        yield from _decode_in_order(decoder, packets, wanted)


def _says_enough(packets: Sequence[av.Packet]) -> bool:
    stream = packets[0].stream
    times = [packet.pts or 0 for packet in packets]
    made_up = stream.codec_context.has_b_frames and times == sorted(times)  # old Matroska files
    return (
        stream.codec_context.codec.canonical_name in SELECTIVE_CODECS
        and stream.container.format.name in TIMED_CONTAINERS
        and not made_up
    )


def _decode_run(
    decoder: av.VideoCodecContext, packets: Sequence[av.Packet], run: Run
) -> Iterator[tuple[int, av.VideoFrame]]:
    # HEVC says of a packet only that nothing of its own temporal layer refers to it.
    skips = decoder.codec.canonical_name == "h264"
    for packet in [*packets[run.start : run.stop], None]:  # None: gives what the decoder still holds
        decoder.skip_frame = "NONREF" if skips and packet is not None and packet.pts not in run.numbers else "DEFAULT"
        for frame in decoder.decode(packet):
            if frame.pts in run.numbers:
                yield run.numbers[frame.pts], frame
    decoder.flush_buffers()


def _decode_in_order(
    decoder: av.VideoCodecContext, packets: Sequence[av.Packet], wanted: Sequence[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    decoder.skip_frame = "DEFAULT"
    numbers = set(wanted)
    number = 0
    for packet in [*packets, None]:
        for frame in decoder.decode(packet):
            if number in numbers:
                yield number, frame
            number += 1
        if number > wanted[-1]:
            return


def _check_work(decoder: av.VideoCodecContext, frames: int) -> None:
    if frames * decoder.width * decoder.height > MAX_CLIP_PIXELS:
        size = f"{decoder.width}x{decoder.height}"
        raise BadSample("video_too_large", f"{frames} frames of {size} to decode: cut the clip into shorter ones")
