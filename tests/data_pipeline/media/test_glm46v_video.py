"""GLM-4.6V's form of videos: frame choice and text against transformers live, patches against goldens_glm46v.npz."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import video_processing_utils
from transformers.video_utils import VideoMetadata

from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.media.image_sizes import tokens_of
from data_pipeline.media.images import patchify, resize
from data_pipeline.media.video import video_patches
from data_pipeline.media.video_files import VideoInfo
from data_pipeline.media.video_sampling import VIDEO_FORMS, video_geometry
from data_pipeline.sample import Sample, Video
from tests.data_pipeline.make_goldens import GOLDENS_GLM46V, VIDEO_BUDGETS, VIDEOS_GLM46V
from tests.data_pipeline.media.test_images import assert_golden
from tests.data_pipeline.media.test_video import random_info
from tests.data_pipeline.media_files import encoded_video, pattern, real_videos

FORM = VIDEO_FORMS["glm46v"]
Glm46VProcessor = import_module("transformers.models.glm46v.processing_glm46v").Glm46VProcessor


@pytest.fixture(scope="module")
def sample_frames() -> Any:
    """Return `Glm46VVideoProcessor.sample_frames`. Its module imports torchvision, but this method does not use it."""
    transforms = "torchvision.transforms"
    names = ("torchvision", transforms, f"{transforms}.v2", f"{transforms}.v2.functional")
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("torchvision") is None:
            assert video_processing_utils  # imported while torchvision is known to be missing
            modules = [ModuleType(name) for name in names]
            for parent, child in pairwise(modules):
                setattr(parent, child.__name__.rpartition(".")[2], child)
            for name, module in zip(names, modules, strict=True):
                patch.setitem(sys.modules, name, module)
        processor = import_module("transformers.models.glm46v.video_processing_glm46v").Glm46VVideoProcessor
    return lambda metadata: processor.sample_frames(SimpleNamespace(temporal_patch_size=2), metadata).tolist()


def written(timestamps: Sequence[float]) -> list[str]:
    return [f"{timestamp:.1f} seconds" for timestamp in timestamps[::2]]


def metadata_of(info: VideoInfo) -> VideoMetadata:
    return VideoMetadata(total_num_frames=info.frames, fps=info.fps, duration=info.duration)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("frames", "fps", "count", "times"),
    [
        (45, 25, 10, [0.0, 0.2, 0.4, 0.6, 0.9]),
        (300, 30, 60, [0.0, 0.3, 0.7, 1.0]),
        (7200, 12, 600, [0.0, 2.0, 4.0]),
        (24 * 3000, 24, 640, [0.0, 9.4, 18.8]),
    ],
)
def test_frames_and_timestamps_of_known_videos(frames: int, fps: float, count: int, times: list[float]) -> None:
    geometry = video_geometry(VideoInfo(frames, fps, frames / fps, 720, 1280), 30000, FORM)
    assert len(geometry.indices) == count
    assert geometry.timestamps[: len(times)] == tuple(f"{time} seconds" for time in times)
    assert len(geometry.timestamps) * tokens_of(geometry.grid) <= 30000


@pytest.mark.fast
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_frame_choice_and_timestamps_equal_transformers_on_random_videos(sample_frames: Any, count: int) -> None:
    rng = np.random.default_rng(46)
    rates: set[int] = set()
    for _ in range(count):
        info = random_info(rng)
        metadata = metadata_of(info)
        metadata.frames_indices = sample_frames(metadata)
        if not metadata.frames_indices:
            assert info.duration < 1 / 6
            with pytest.raises(BadSample, match="video_too_short: the model sees no frame"):
                video_geometry(info, 30000, FORM)
            continue
        geometry = video_geometry(info, 30000, FORM)
        assert list(geometry.indices) == metadata.frames_indices
        assert list(geometry.timestamps) == written(metadata.timestamps)
        rates.add(int(np.searchsorted([30, 300, 2400], info.duration)))
    assert rates == {0, 1, 2, 3}


@pytest.mark.fast
def test_text_form_equals_transformers(tokenizer: GlmTokenizer) -> None:
    """Encode the text to which transformers' processor expands <|video|>, as one string."""
    rng = np.random.default_rng(5)
    writer = SimpleNamespace(image_token="<|image|>", video_processor=SimpleNamespace(merge_size=2))
    writer.replace_frame_token_id = lambda *args, **kwargs: Glm46VProcessor.replace_frame_token_id(
        writer, *args, **kwargs
    )
    for _ in range(100):
        info = random_info(rng)
        if info.duration < 1 / 6:
            continue
        geometry = video_geometry(info, 1000, FORM)
        metadata = VideoMetadata(info.frames, info.fps, frames_indices=list(geometry.indices))
        grid = torch.tensor([[len(geometry.seconds), *geometry.grid]])
        written = Glm46VProcessor.replace_video_token(writer, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
        expected: list[int] = []
        for part in re.split(r"(<\|.*?\|>)", f"<|begin_of_video|>{written}<|end_of_video|>"):
            expected += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
        tokens = tokenize(Sample("video", (Video(),)), tokenizer, videos=[geometry])
        assert tokens.input_ids.tolist() == expected
        assert not tokens.loss.any()
        assert tokens.frames_per_image == (2,) * len(geometry.seconds)


def test_patches_equal_the_default_processor() -> None:
    goldens = dict(np.load(GOLDENS_GLM46V))
    for _, longest_edge in VIDEO_BUDGETS:
        for seed, (frames, height, width, fps) in enumerate(VIDEOS_GLM46V):
            name = f"video/{longest_edge}/{seed}"
            geometry = video_geometry(VideoInfo(frames, fps, frames / fps, height, width), longest_edge // 1568, FORM)
            assert list(geometry.indices) == goldens[f"{name}/indices"].tolist()
            assert list(geometry.timestamps) == written(goldens[f"{name}/timestamps"])
            assert [[len(geometry.seconds), *geometry.grid]] == goldens[f"{name}/grid"].tolist()
            video = np.stack([pattern(height, width, seed + index) for index in geometry.indices])
            resized = resize(torch.from_numpy(video).permute(0, 3, 1, 2), geometry.size)
            assert_golden(goldens, name, torch.cat([patchify(pair) for pair in resized.split(2)]), 2)


def test_real_videos_equal_the_default_processor() -> None:
    goldens = dict(np.load(GOLDENS_GLM46V))
    _, longest_edge = VIDEO_BUDGETS[1]
    for video_name, data in real_videos():
        name = f"clip/{longest_edge}/{video_name}"
        assert zlib.crc32(data) == goldens[f"{name}/file"], f"{name} differs from the file of make_goldens.py"
        slices, geometry = video_patches(data, longest_edge // 1568, FORM)
        assert list(geometry.indices) == goldens[f"{name}/indices"].tolist()
        assert list(geometry.timestamps) == written(goldens[f"{name}/timestamps"])
        assert [[len(geometry.seconds), *geometry.grid]] == goldens[f"{name}/grid"].tolist()
        assert_golden(goldens, name, slices, 2)


@pytest.mark.fast
def test_variable_rate_follows_the_true_times() -> None:
    """Walk over the frames one by one, as transformers does, but with the true times."""
    rng = np.random.default_rng(7)
    for _ in range(300):
        frames = int(np.exp(rng.uniform(np.log(4), np.log(3000))))
        times = np.cumsum([0, *rng.exponential(float(rng.choice([0.02, 0.1, 1.0])), frames - 1)]).tolist()
        duration = times[-1] + 0.5
        pairs = 3 if duration <= 30 else 1 if duration <= 300 else 0.5
        wanted, moment, expected = min(int(min(duration, 2400) * pairs * 2), 640), 0.0, []
        for number, time in enumerate(times if frames >= wanted else ()):
            if time >= moment:
                expected.append(number)
                moment += 1 / (2 * pairs)
                if moment >= int(duration):
                    break
        if len(expected) != wanted:
            within = expected if 0 < len(expected) < wanted else [0, frames - 1]
            expected = np.linspace(within[0], within[-1], wanted, dtype=int).tolist()
        expected = list(dict.fromkeys(expected))
        expected += expected[-1:] * (len(expected) % 2)
        info = VideoInfo(frames, frames / duration, duration, 280, 280, times=tuple(times))
        geometry = video_geometry(info, 30000, FORM)
        assert list(geometry.indices) == expected
        assert list(geometry.seconds) == [times[number] for number in expected[::2]]


def test_video_that_is_too_short_is_rejected() -> None:
    with pytest.raises(BadSample, match=r"video_too_short: the model sees no frame of a video of 0\.120 seconds"):
        video_patches(encoded_video(3, fps=25), 100, FORM)
