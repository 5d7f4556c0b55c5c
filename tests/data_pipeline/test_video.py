"""Clips against transformers: frame choice, timestamps, decoding and the text form live, patches by goldens.npz."""

from __future__ import annotations

import io
import re
import tempfile
import zlib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata, read_video_pyav

from data_pipeline.errors import BadSample
from data_pipeline.images import patchify, resize, tokens_of
from data_pipeline.sample import Sample, Video
from data_pipeline.tokens import GlmTokenizer, tokenize
from data_pipeline.video import VideoInfo, frame_indices, plan_video, probe_video, video_slices
from tests.data_pipeline.make_goldens import CLIPS, GOLDENS, VIDEO_BUDGETS
from tests.data_pipeline.media import clip, encoded, pattern, real_clips
from tests.data_pipeline.test_images import assert_golden

# The classes need torchvision to be made, but these methods do not.
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
def test_frames_of_known_clips(frames, fps, duration, expected):
    assert frame_indices(frames, fps, duration) == expected


@pytest.mark.fast
def test_a_long_clip_is_spread_over_its_length():
    indices = frame_indices(7200, 12, 600)
    assert (len(indices), indices[:4], indices[-1]) == (600, [0, 13, 25, 37], 7199)
    layout = plan_video(VideoInfo(7200, 12.0, 600.0, 720, 1280), max_tokens=30000)
    assert layout.seconds[:3] == (0, 2, 4)
    assert layout.size == (196, 364)
    assert len(layout.seconds) * tokens_of(layout.grid) == 27300


@pytest.mark.fast
def test_frame_choice_and_timestamps_equal_transformers_on_random_clips():
    rng = np.random.default_rng(3)
    long_clips = 0
    for _ in range(2000):
        info = random_info(rng)
        metadata = VideoMetadata(total_num_frames=info.frames, fps=info.fps, duration=info.duration)
        metadata.frames_indices = reference_indices(metadata)
        layout = plan_video(info, max_tokens=30000)
        assert list(layout.indices) == metadata.frames_indices
        assert list(layout.seconds) == [int(timestamp) for timestamp in metadata.timestamps[::2]]
        long_clips += info.duration > 300
    assert long_clips > 300


@pytest.mark.fast
def test_frame_choice_without_a_duration():
    rng = np.random.default_rng(4)
    for _ in range(500):
        info = random_info(rng)
        metadata = VideoMetadata(total_num_frames=info.frames, fps=info.fps)
        assert frame_indices(info.frames, info.fps, None) == reference_indices(metadata)


@pytest.mark.fast
def test_text_form_equals_transformers(tokenizer: GlmTokenizer):
    """The expansion of <|video|>, written out by transformers' processor and encoded as one string."""
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
        layout = plan_video(info, max_tokens=400)
        metadata = VideoMetadata(info.frames, info.fps, frames_indices=list(layout.indices))
        grid = torch.tensor([[len(layout.seconds), *layout.grid]])
        written = Glm4vProcessor.replace_video_token(writer, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
        expected: list[int] = []
        for part in re.split(r"(<\|.*?\|>)", f"<|begin_of_video|>{written}<|end_of_video|>"):
            expected += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
        tokens = tokenize(Sample("video", (Video(),)), tokenizer, videos=[layout])
        assert tokens.input_ids.tolist() == expected
        assert not tokens.loss.any()
        assert tokens.frames == (2,) * len(layout.seconds)


@pytest.mark.fast
def test_the_last_lone_frame_is_paired_with_itself():
    slices, layout = video_slices(clip(5, fps=1), max_tokens=100)
    assert layout.indices == (0, 1, 2, 3, 4, 4)
    last_pair = slices.reshape(3, -1, 2, 588)[2]
    assert last_pair[:, 0].equal(last_pair[:, 1])
    first_pair = slices.reshape(3, -1, 2, 588)[0]
    assert not first_pair[:, 0].equal(first_pair[:, 1])


@pytest.mark.parametrize(("frames", "fps"), [(1, 25), (2, 1), (9, 8), (40, 30), (50, 12)])
def test_decoded_frames_equal_transformers_reader(tmp_path, frames, fps):
    data = clip(frames, fps=fps)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    decoded, metadata = read_video_pyav(str(path), lambda metadata: reference_indices(metadata))
    info = probe_video(data)
    assert (info.frames, info.fps, info.duration) == (metadata.total_num_frames, metadata.fps, metadata.duration)

    slices, layout = video_slices(data, max_tokens=1000)
    assert list(layout.indices) == metadata.frames_indices
    unique = list(dict.fromkeys(layout.indices))
    assert len(decoded) == len(unique)
    frames_by_index = dict(zip(unique, torch.from_numpy(decoded).permute(0, 3, 1, 2), strict=True))
    resized = resize(torch.stack([frames_by_index[index] for index in layout.indices]), layout.size)
    assert slices.equal(torch.cat([patchify(pair) for pair in resized.split(2)]))


def test_patches_equal_the_default_processor():
    goldens = dict(np.load(GOLDENS))
    for _, longest_edge in VIDEO_BUDGETS:
        for seed, (frames, height, width, fps) in enumerate(CLIPS):
            name = f"video/{longest_edge}/{seed}"
            info = VideoInfo(frames, fps, frames / fps, height, width)
            layout = plan_video(info, max_tokens=longest_edge // (2 * 784))
            assert list(layout.indices) == goldens[f"{name}/indices"].tolist()
            assert list(layout.seconds) == goldens[f"{name}/timestamps"][::2].astype(int).tolist()
            assert [[len(layout.seconds), *layout.grid]] == goldens[f"{name}/grid"].tolist()
            video = np.stack([pattern(height, width, seed + index) for index in layout.indices])
            resized = resize(torch.from_numpy(video).permute(0, 3, 1, 2), layout.size)
            assert_golden(goldens, name, torch.cat([patchify(pair) for pair in resized.split(2)]), 2)


def test_real_clips_equal_the_default_processor():
    goldens = dict(np.load(GOLDENS))
    for _, longest_edge in VIDEO_BUDGETS:
        for clip_name, data in real_clips():
            name = f"clip/{longest_edge}/{clip_name}"
            assert zlib.crc32(data) == goldens[f"{name}/file"], f"{name} is another file than in make_goldens.py"
            slices, layout = video_slices(data, max_tokens=longest_edge // (2 * 784))
            assert list(layout.indices) == goldens[f"{name}/indices"].tolist()
            assert list(layout.seconds) == goldens[f"{name}/timestamps"][::2].astype(int).tolist()
            assert [[len(layout.seconds), *layout.grid]] == goldens[f"{name}/grid"].tolist()
            assert_golden(goldens, name, slices, 2)


def test_a_container_that_does_not_count_its_frames():
    data = clip(24, fps=8, format="matroska", codec="libx264")
    assert probe_video(data).frames == 24
    slices, layout = video_slices(data, max_tokens=100)
    assert len(slices) == len(layout.indices) * layout.grid[0] * layout.grid[1]


def cut_short() -> bytes:
    """The second half of the frames is missing, but the header at the front still promises them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        faststart = {"movflags": "faststart"}
        with av.open(io.BytesIO(clip(80)), "r") as source, av.open(str(path), "w", options=faststart) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        data = path.read_bytes()
    return data[: len(data) * 2 // 3]


def sound_without_pictures() -> bytes:
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
        (clip(0), "video_without_frames"),
        (sound_without_pictures(), "video_without_frames"),
        (clip(40)[:3000], "unreadable_video"),
        (cut_short(), "unreadable_video"),
        (clip(3, height=16, width=4000), "extreme_aspect"),
        (encoded(pattern(50, 50), "JPEG")[:100], "unreadable_video"),
    ],
    ids=["text", "empty", "no_frames", "sound_only", "truncated", "cut_short", "1:250", "half_a_jpeg"],
)
def test_bad_clips_have_a_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        video_slices(data, max_tokens=100)
    assert caught.value.reason == reason
