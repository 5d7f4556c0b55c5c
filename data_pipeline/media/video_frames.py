"""Decode chosen frames of a video, and no packet that they do not need.

Packets stand in decoding order; frames are numbered in presentation order, by their times. A key frame and the packets
up to the next one are a group: it is decoded from its start, or not at all. Here frames 2 and 7 are wanted:

    I0 P3 B1 B2 P5 B4 | I6 P9 B7 B8 | I10 ...      packets (the number is the frame's)
    +  +  -  +  .  .    +  +  +  .    .

A group is decoded up to its last wanted packet (+). Of those, the decoder itself skips H.264's packets that no other
packet refers to (-). A group may be open: frames that follow its key frame but are shown before it refer to the group
before it; if one of them is wanted, that group is decoded completely first.

The frames are those of decoding everything in order, byte for byte. If the stream does not say enough to be sure of
that (no times, other codecs and containers, a frame that does not come), everything is decoded in order. A frame that
cannot be decoded, as its group begins before the file does, is replaced by the next one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import av

from data_pipeline.errors import BadSample

# Codecs in which a packet is one frame with its own time, and decoding can start at a key frame.
SELECTIVE_CODECS = ("h264", "hevc", "vp9", "av1")
# Containers that say when a packet's frame is shown. (AVI does not: FFmpeg invents times, in decoding order.)
TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")

MAX_VIDEO_PIXELS = 200_000_000_000  # decoded per video: 96,000 frames of 1080p, about ten minutes on one core


@dataclass(frozen=True)
class PacketRange:
    """Consecutive packets start..stop-1, decoded from a key frame."""

    start: int
    stop: int
    wanted: dict[int, int]  # the number of each wanted frame, by its time


def choose_packet_ranges(packets: Sequence[av.Packet], wanted: Sequence[int]) -> list[PacketRange] | None:
    """Choose what to decode for the frames `wanted` (ascending, not empty) of a video.

    Returns:
        Ranges in order, or None if everything must be decoded.
    """
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(set(times)) < len(packets) or min(times) < times[0] or not packets[0].is_keyframe:
        return None
    # Packets that an edit list hides are decoded, as others may refer to them, but not shown.
    shown = sorted((at for at, packet in enumerate(packets) if not packet.is_discard), key=lambda at: times[at])
    if wanted[-1] >= len(shown):
        return None

    keys = [at for at, packet in enumerate(packets) if packet.is_keyframe]
    ranges: list[PacketRange] = []
    for at, number in sorted((shown[number], number) for number in wanted):
        group = bisect_right(keys, at) - 1
        leading = times[at] < times[keys[group]]
        new = PacketRange(keys[group - leading], at + 1, {times[at]: number})
        while ranges and new.start < ranges[-1].stop:
            last = ranges.pop()
            new = PacketRange(min(last.start, new.start), new.stop, last.wanted | new.wanted)
        ranges.append(new)
    return ranges


def decode_frames(packets: Sequence[av.Packet], wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode the frames `wanted` (ascending, not empty) of a video.

    A frame may come twice; frames that the video does not hold do not come.

    Args:
        packets: All packets of the video stream.
        wanted: Numbers of frames.

    Yields:
        (number, frame), as they come out of the decoder.

    Raises:
        FFmpegError: A packet cannot be decoded.
        BadSample: `video_too_large`, if decoding would take unreasonably long.
    """
    if not packets:
        return
    decoder = packets[0].stream.codec_context
    timed = _times_are_true(packets)
    selective = timed and decoder.codec.canonical_name in SELECTIVE_CODECS
    ranges = choose_packet_ranges(packets, wanted) if selective else None
    missing = set(wanted)
    if ranges is not None:
        _check_work(decoder, sum(chosen.stop - chosen.start for chosen in ranges))
        with suppress(av.error.FFmpegError):  # decoding in order shows whether it matters
            for chosen in ranges:
                for number, frame in _decode_range(decoder, packets, chosen):
                    missing.discard(number)
                    yield number, frame
                if not missing.isdisjoint(chosen.wanted.values()):
                    break
        decoder.flush_buffers()
    if missing:
        _check_work(decoder, min(len(packets), wanted[-1] + 1))
        decoded = _decode_in_order(decoder, packets)
        yield from _chosen_by_time(decoded, packets, wanted) if timed else _chosen_by_number(decoded, wanted)


def _times_are_true(packets: Sequence[av.Packet]) -> bool:
    """Check that the container says when the frame of each packet is shown."""
    stream = packets[0].stream
    times = [packet.pts for packet in packets if packet.pts is not None]
    invented = stream.codec_context.has_b_frames and times == sorted(times)  # old Matroska files
    return stream.container.format.name in TIMED_CONTAINERS and len(set(times)) == len(packets) and not invented


def _decode_range(
    decoder: av.VideoCodecContext, packets: Sequence[av.Packet], chosen: PacketRange
) -> Iterator[tuple[int, av.VideoFrame]]:
    # HEVC says of a packet only that nothing of its own temporal layer refers to it.
    skips = decoder.codec.canonical_name == "h264"
    for packet in [*packets[chosen.start : chosen.stop], None]:  # None: returns what the decoder still holds
        decoder.skip_frame = "NONREF" if skips and packet is not None and packet.pts not in chosen.wanted else "DEFAULT"
        for frame in decoder.decode(packet):
            if frame.pts in chosen.wanted:
                yield chosen.wanted[frame.pts], frame
    decoder.flush_buffers()


def _decode_in_order(decoder: av.VideoCodecContext, packets: Sequence[av.Packet]) -> Iterator[av.VideoFrame]:
    decoder.skip_frame = "DEFAULT"
    for packet in [*packets, None]:
        yield from decoder.decode(packet)


def _chosen_by_number(decoded: Iterable[av.VideoFrame], wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    numbers = set(wanted)
    for number, frame in enumerate(decoded):
        if number in numbers:
            yield number, frame
        if number >= wanted[-1]:
            return


def _chosen_by_time(
    decoded: Iterable[av.VideoFrame], packets: Sequence[av.Packet], wanted: Sequence[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    shown = sorted(packet.pts for packet in packets if not packet.is_discard and packet.pts is not None)
    remaining = deque((shown[number], number) for number in wanted if number < len(shown))
    for frame in decoded:
        while remaining and frame.pts is not None and frame.pts >= remaining[0][0]:
            yield remaining.popleft()[1], frame
        if not remaining:
            return


def _check_work(decoder: av.VideoCodecContext, frames: int) -> None:
    if frames * decoder.width * decoder.height > MAX_VIDEO_PIXELS:
        size = f"{decoder.width}x{decoder.height}"
        raise BadSample("video_too_large", f"{frames} frames of {size} to decode: cut the video into shorter ones")
