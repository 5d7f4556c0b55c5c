"""Real files for the data tests: records of every domain with their images and videos, and shards of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.loaders import opened
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

TEXTS = [
    "A red square stands left of a blue circle.",
    "The quick brown fox jumps over the lazy dog; 12 boxes, 345 images.",
    "Reasoning first: the image shows two cats. So the answer is 2.",
    "图中有一只猫，坐在窗边。",
    "Describe the video. What happens at second 14?",
]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """Close the loaders of a test: other tests count the workers."""
    yield
    while opened:
        opened.pop().close()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> GlmTokenizer:
    return GlmTokenizer(tokenizer_folder)


def sample_records(folder: Path, samples: int, seed: int = 0) -> Path:
    """Write records of every domain with their files, and return the JSON-lines file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(samples):
        caption = " ".join(TEXTS[index] for index in rng.integers(0, len(TEXTS), rng.integers(1, 4)))
        images: list[str] = []
        videos: list[str] = []

        def add_image(images=images, number=number) -> str:
            name = f"{number}-{len(images)}.{('jpg', 'png')[int(rng.integers(2))]}"
            height, width = rng.integers(40, 200, 2).tolist()
            (folder / name).write_bytes(
                encoded(pattern(height, width, number), {"jpg": "JPEG", "png": "PNG"}[name[-3:]])
            )
            images.append(name)
            return "<image>"

        record: dict
        match ("image_text", "interleaved", "ocr", "grounding", "video", "text", "chat", "text")[number % 8]:
            case "video":
                (folder / f"{number}.mp4").write_bytes(encoded_video(int(rng.integers(3, 30))))
                videos.append(f"{number}.mp4")
                record = {"domain": "video", "text": caption}
            case "text":
                record = {"domain": "text", "text": caption * int(rng.integers(1, 12))}
            case "chat":
                question = f"{add_image()}{caption}"
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
                if thinking := bool(rng.integers(2)):
                    messages[1]["reasoning_content"] = "Let me look."
                record = {"domain": "chat", "messages": messages, "thinking": thinking}
            case "interleaved" | "grounding" as domain:
                record = {"domain": domain, "text": f"{add_image()}{caption}{add_image()} and [[10,20,300,400]]"}
            case domain:
                add_image()
                record = {"domain": domain, "text": caption}
        records.append({**record, "images": images, "videos": videos})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def shard_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: GlmTokenizer) -> tuple[Path, Path]:
    """Two sources of shards, 96 and 40 samples, several shards each."""
    root = tmp_path_factory.mktemp("data")
    for name, samples, seed in (("big", 96, 1), ("small", 40, 2)):
        records = sample_records(root / f"{name}_records", samples, seed)
        counts = build_shards([records], root / name, tokenizer=tokenizer.folder, shard_bytes=100_000).counts
        assert not counts.rejected
        assert len(counts.shards) > 1
    return root / "big", root / "small"


@pytest.fixture
def data_config(shard_folders: tuple[Path, Path], tokenizer_folder: Path) -> DataConfig:
    big, small = shard_folders
    return DataConfig(
        tokenizer=str(tokenizer_folder),
        sources=[SourceConfig(str(big), 2.0), SourceConfig(str(small), 1.0)],
        num_workers=0,
        image_max_tokens=40,
        video_max_tokens=100,
    )


@pytest.fixture
def own_shards(shard_folders, tmp_path, data_config) -> tuple[Path, DataConfig]:
    """Copy the small source, so that a test may damage it."""
    folder = Path(shutil.copytree(shard_folders[1], tmp_path / "shards"))
    return folder, replace(data_config, sources=[SourceConfig(str(folder))])
