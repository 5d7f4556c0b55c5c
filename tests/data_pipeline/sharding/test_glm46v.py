"""Shards for GLM-4.6V, from a build to the packs of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.video_files import VideoInfo
from data_pipeline.media.video_sampling import VIDEO_FORMS, video_geometry
from data_pipeline.sharding.build import build_shards
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.sharding.verify import jobs_of, verify_shards
from data_pipeline.shards.index import read_index
from tests.data_pipeline.loaders import loader
from tests.data_pipeline.media_files import encoded_video

SECONDS = (1, 2, 5)


@pytest.fixture(scope="module")
def newer(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GlmTokenizer:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path_factory.mktemp("glm46v") / "tokenizer"))
    (folder / "preprocessor_config.json").write_text('{"processor_class": "Glm46VProcessor"}')
    return GlmTokenizer(folder)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    lines = []
    for seconds in SECONDS:
        (tmp_path / f"{seconds}.mp4").write_bytes(encoded_video(25 * seconds, fps=25))
        lines.append({"domain": "video", "text": f"Video {seconds}.", "videos": [f"{seconds}.mp4"]})
    (tmp_path / "short.mp4").write_bytes(encoded_video(3, fps=25))
    lines.append({"domain": "video", "text": "Too short.", "videos": ["short.mp4"]})
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_build_verify_and_packs(records: Path, newer: GlmTokenizer, tokenizer: GlmTokenizer, tmp_path: Path) -> None:
    built = build_shards([records], tmp_path / "out", tokenizer=newer.folder)
    assert dict(built.counts.rejected) == {"video_too_short": 1}
    index = read_index(next((tmp_path / "out").glob("*.tar")))
    assert (index.header.tokenizer_hash, index.header.chat_form) == (newer.hash, "glm46v")
    pairs = [videos[0]["pairs"] for videos in index.table.column("videos").to_pylist()]
    infos = [VideoInfo(25 * seconds, 25.0, float(seconds), 48, 64) for seconds in SECONDS]
    expected = [video_geometry(info, 400, VIDEO_FORMS["glm46v"]) for info in infos]
    assert pairs == [len(geometry.seconds) for geometry in expected] == [3, 6, 15]

    for folder in ("", str(newer.folder), str(tokenizer.folder)):  # the index says how videos were sampled
        found = list(verify_shards(*[jobs_of([str(tmp_path / "out")], folder)[0]]))
        assert [one.rejected for one in found] == [[]]

    config = DataConfig(
        tokenizer=str(newer.folder), sources=[SourceConfig(str(tmp_path / "out"))], num_workers=0, video_max_tokens=400
    )
    seen = set()
    for batch in loader(config, batch=2, seq_length=1024).next_step():
        assert not batch.quarantined
        for start, length in zip(batch.cu_seqlens.tolist(), batch.segment_lengths.tolist(), strict=False):
            ids = [token for token in batch.input_ids[start : start + length].tolist() if token not in newer.names]
            seen.update(newer.decode(ids).split("Video")[0:1] if length else [])
    assert {"".join(geometry.timestamps) for geometry in expected} == seen


def test_long_samples_are_cut_between_videos(records: Path, newer: GlmTokenizer, tmp_path: Path) -> None:
    text = "<video> one <video> two <video> three"
    line = {"domain": "interleaved", "text": text, "videos": [f"{seconds}.mp4" for seconds in SECONDS]}
    records.write_text(json.dumps(line))
    build_shards([records], tmp_path / "out", tokenizer=newer.folder)
    config = DataConfig(
        tokenizer=str(newer.folder),
        sources=[SourceConfig(str(tmp_path / "out"), epochs=1)],
        num_workers=0,
        video_max_tokens=100,
        too_long="split",
    )
    packs = loader(config, batch=8, seq_length=256, small_steps=1).next_step()
    assert not [sample for pack in packs for sample in pack.quarantined]
    assert sum(pack.num_images for pack in packs) == 24


def test_a_shard_is_indexed_again_for_the_other_generation(
    records: Path, newer: GlmTokenizer, tokenizer: GlmTokenizer, tmp_path: Path
) -> None:
    build_shards([records], tmp_path / "out", tokenizer=tokenizer.folder)
    tar = next((tmp_path / "out").glob("*.tar"))
    older = tar.with_suffix(".index.arrow").read_bytes()
    with pytest.raises(DataError, match=r"holds another build: .*tokenizer was .* and is .*-glm46v"):
        build_shards([records], tmp_path / "out", tokenizer=newer.folder, chat_form="glm46v")
    assert dict(index_shards([tar], tokenizer=newer.folder).rejected) == {"video_too_short": 1}
    assert tar.with_suffix(".index.arrow").read_bytes() != older
    index_shards([tar], tokenizer=tokenizer.folder)
    assert tar.with_suffix(".index.arrow").read_bytes() == older


def test_positions_of_131072_tokens_pass_unchanged(newer: GlmTokenizer, tmp_path: Path) -> None:
    """A sequence of GLM-4.6V's length: nothing on the way limits or wraps it."""
    length = 131_072
    words = "a b c d e f g h " * 40_000
    (tmp_path / "long.jsonl").write_text(json.dumps({"domain": "text", "text": words}))
    build_shards([tmp_path / "long.jsonl"], tmp_path / "out", tokenizer=newer.folder)
    config = DataConfig(tokenizer=str(newer.folder), sources=[SourceConfig(str(tmp_path / "out"))], num_workers=0)
    batch = max(loader(config, batch=3, seq_length=length).next_step(), key=lambda batch: batch.num_tokens)
    assert (len(batch.input_ids), batch.num_tokens) == (length, length)
    assert batch.position_ids.tolist() == [list(range(length))] * 3
    assert batch.cu_seqlens.tolist() == [0, length]
    assert not batch.quarantined


def test_video_of_a_sixth_of_a_second_is_the_shortest() -> None:
    form = VIDEO_FORMS["glm46v"]
    assert video_geometry(VideoInfo(6, 30.0, 0.2, 56, 56), 100, form).indices == (0, 0)
    with pytest.raises(BadSample, match="video_too_short"):
        video_geometry(VideoInfo(4, 25.0, 0.16, 56, 56), 100, form)
