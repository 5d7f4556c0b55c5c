"""Shards that a test may change: one of five samples, and a folder with samples of every domain."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.loading.source import Source
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.shards.shard_files import FILES


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path, "written", max_bytes=1 << 20) as writer:
        for number in range(5):
            writer.write(f"{number:09d}", FILES)
    assert [path.name for path in writer.finished] == ["written-00000.tar"]
    return writer.finished[0]


@pytest.fixture
def shards(shard_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folders[1], tmp_path / "shards"))


@pytest.fixture
def opened(shards: Path, tokenizer: GlmTokenizer) -> Callable[..., Source]:
    """Return a function that opens the folder, or files in it, as a source."""

    def open_source(pattern: str = "") -> Source:
        budget = PixelBudget(30, 60)
        return Source(SourceConfig(str(shards / pattern)), tokenizer_hash=tokenizer.hash, budget=budget)

    return open_source
