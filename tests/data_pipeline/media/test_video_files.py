"""Videos of many kinds: the frames that the model sees and their seconds, against torchcodec and the true times."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from data_pipeline.errors import BadSample
from data_pipeline.media.images import patchify, resize
from data_pipeline.media.pixel_budget import TEMPORAL_PATCH_SIZE
from data_pipeline.media.video import video_patches
from data_pipeline.media.video_files import (
    VideoInfo,
    open_video,
    probe_video,
    video_info,
    video_packets,
)
from data_pipeline.media.video_frames import decode_frames
from data_pipeline.media.video_sampling import VideoGeometry, video_geometry
from data_pipeline.sharding.measure import measure
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import RawSample
from tests.data_pipeline.media.video_cases import (
    CONSTANT,
    VARIABLE,
    Track,
    made,
    number_in,
)

GOLDENS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("video_goldens.json").read_text())
MAX_TOKENS = 4000
# torchcodec takes the time of decoding for the time of the last frame, as FFmpeg does not know better without a flag.
LAST_TIME_UNKNOWN = "mpeg program stream"
# AVI does not say when a frame is shown. FFmpeg invents times, and torchcodec returns frames that are shown earlier.
TIMES_INVENTED = ("avi, B-frames", "avi, H.264 with B-frames")


def seen(data: bytes) -> tuple[VideoInfo, VideoGeometry, list[int]]:
    """Return what is known of a video, how the model sees it, and the number that each sampled frame shows."""
    info = probe_video(data)
    slices, geometry = video_patches(data, MAX_TOKENS)
    assert geometry == video_geometry(info, MAX_TOKENS)
    shown: dict[int, int] = {}
    upright: dict[int, np.ndarray] = {}
    with open_video(data) as container:
        for index, frame in decode_frames(video_packets(container), sorted(set(geometry.indices))):
            upright[index] = np.rot90(frame.to_ndarray(format="rgb24"), info.quarter_turns).copy()
            shown[index] = number_in(upright[index])
    frames = torch.from_numpy(np.stack([upright[index] for index in geometry.indices])).permute(0, 3, 1, 2)
    pairs = resize(frames, geometry.size).split(TEMPORAL_PATCH_SIZE)
    assert slices.equal(torch.cat([patchify(pair) for pair in pairs]))
    return info, geometry, [shown[index] for index in geometry.indices]


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_rate_equals_torchcodec(name: str) -> None:
    golden = GOLDENS[name]
    info, geometry, shown = seen(CONSTANT[name]())
    assert info.times == ()
    assert (info.frames, [info.height, info.width]) == (golden["frames"], golden["size"])
    if name == LAST_TIME_UNKNOWN:
        assert (info.fps, info.duration) == (25, pytest.approx(golden["duration"] + 1 / 25))
        return
    assert (info.fps, info.duration) == (golden["fps"], golden["duration"])
    assert list(geometry.indices) == golden["indices"]
    assert list(geometry.seconds) == golden["seconds"]
    if name not in TIMES_INVENTED:
        known = [(ours, theirs) for ours, theirs in zip(shown, golden["shown"], strict=True) if theirs is not None]
        assert [ours for ours, _ in known] == [theirs for _, theirs in known]
    if not name.startswith("edited"):
        assert shown == list(geometry.indices)


@pytest.mark.parametrize("name", VARIABLE)
def test_variable_rate_follows_the_true_times(name: str) -> None:
    """Every half second is shown by the first frame at or after it, with that frame's second."""
    make, times = VARIABLE[name]
    numbers = range(100) if name == "avi, dropped frames" else range(len(times))
    golden = GOLDENS[name]
    info, geometry, shown = seen(make(times))
    assert (info.frames, info.fps, info.duration) == (golden["frames"], golden["fps"], golden["duration"])
    np.testing.assert_allclose(info.times, np.array(times) / 1000, atol=1e-4)
    if info.duration <= 300:
        moments = [500 * number for number in range(int(2 * info.duration))]
    elif info.frames > 600:
        moments = np.linspace(0, 1000 * info.duration, 600).tolist()
    else:
        moments = times
    last = len(times) - 1
    expected = [next((index for index, time in enumerate(times) if time >= moment), last) for moment in moments]
    unique = list(dict.fromkeys(expected))
    unique += unique[-1:] * (len(unique) % 2)
    assert list(geometry.indices) == unique
    assert list(geometry.seconds) == [times[index] // 1000 for index in unique[::2]]
    drawn = [number for number in numbers if number * 100 in times] if name == "avi, dropped frames" else numbers
    assert shown == [drawn[index] for index in unique]


def test_times_from_the_first_frame_are_exact() -> None:
    """2.3 - 0.3 is 1.9999999999999998, which is in another second than 2."""
    info = probe_video(made(Track(4, times=[300, 1300, 2300, 9300]), format="matroska"))
    assert info.times == (0, 1, 2, 9)


def test_index_has_the_frame_pairs_that_are_decoded() -> None:
    for name in ("slides", "random gaps, mkv", "avi, dropped frames"):
        make, times = VARIABLE[name]
        data = make(times)
        row = measure(RawSample({"domain": "video", "text": "A"}, [], [data]), None, "").index_row(ShardSample("a"))
        slices, geometry = video_patches(data, MAX_TOKENS)
        assert row["videos"][0]["pairs"] == len(geometry.seconds)
        assert len(slices) == 2 * len(geometry.seconds) * geometry.grid[0] * geometry.grid[1]


def test_turned_videos_are_upright_in_the_index_and_as_patches() -> None:
    data = made(Track(8, 4, turned=90))
    with av.open(io.BytesIO(data)) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (64, 48)
    info = probe_video(data)
    assert (info.height, info.width, info.quarter_turns) == (48, 64, 1)
    assert video_patches(data, 1000)[1].size == video_geometry(VideoInfo(8, 4, 2, 48, 64), 1000).size


@pytest.mark.parametrize("frames", [1, 2])
def test_turned_videos_of_a_few_frames_are_upright(frames: int) -> None:
    """The decoder holds back frames of H.264 until it has several, or sees the end."""
    data = made(Track(frames, 4, turned=90))
    info = probe_video(data)
    assert (info.height, info.width, info.quarter_turns) == (48, 64, 1)
    assert video_patches(data, 1000)[1] == video_geometry(info, 1000)


def test_header_of_a_constant_rate_gives_what_the_packets_give() -> None:
    for name in ("mp4 23.976 fps", "mp4 29.97 fps", "pyramid of B-frames, no edit list", "turned by 90", "sound"):
        data = CONSTANT[name]()
        with open_video(data) as container:
            packets = video_packets(container)
            times = sorted(packet.pts for packet in packets if packet.pts is not None)
            base = float(packets[0].time_base or 0)
            info = video_info(container, data, packets)
        assert info == probe_video(data)
        np.testing.assert_allclose(np.arange(info.frames) / info.fps, (np.array(times) - times[0]) * base, atol=1e-9)


def test_sound_with_cover_art_is_no_video() -> None:
    data = made(Track(1, codec="mjpeg", attached=True), sound=True)
    with pytest.raises(BadSample, match=r"video_without_frames.*cover art"):
        probe_video(data)


def test_empty_packets_are_no_frames() -> None:
    """Recorders store a frame that they have dropped as a packet of no bytes."""
    data = bytearray(made(Track(30, 10, "mjpeg"), format="mov"))
    table = data.index(b"stsz") + 16
    data[table + 4 * 27 : table + 4 * 30] = bytes(12)
    info, geometry, shown = seen(bytes(data))
    assert (info.frames, info.fps, info.duration) == (27, 10, 2.7)
    assert shown == list(geometry.indices) == [0, 5, 10, 15, 20, 20]


def test_frames_before_the_first_key_frame_are_replaced_by_it() -> None:
    """A recording of a broadcast begins within a group of frames."""
    data = made(Track(75, options={"g": "12", "bf": "0"}), format="mpegts")
    with av.open(io.BytesIO(data), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        later = next(at for at, packet in enumerate(packets) if at > 0 and packet.is_keyframe)
        cut = packets[5].pos
    assert cut is not None
    tables = data[: 188 * 3]
    _, geometry, shown = seen(tables + data[cut // 188 * 188 :])
    assert shown[0] == later
    assert shown[1:] == [index + 5 for index in geometry.indices[1:]]
