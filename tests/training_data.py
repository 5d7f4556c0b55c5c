"""Fixtures: small real shards, and the configuration of a run over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

WORDS = ["a", "small", "red", "house", "by", "the", "wide", "river", "under", "old", "trees", "where", "two", "grey",
         "birds", "sing", "all", "day"]  # fmt: skip


def sentence(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + 3 * i * i + i) % len(WORDS)] for i in range(length))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder of sources: pictures with captions, text, clips, chats."""
    folder = tmp_path_factory.mktemp("shards")
    media = folder / "media"
    media.mkdir()
    for n in range(24):
        (media / f"{n}.jpg").write_bytes(encoded(pattern(60 + 9 * (n % 5), 80 + 11 * (n % 7), seed=n)))
    for n in range(3):
        (media / f"{n}.mp4").write_bytes(encoded_video(frames=16 + 8 * n))
    records: dict[str, list[dict[str, object]]] = {
        "pictures": [{"domain": "image_text", "text": sentence(n, 8 + n % 9), "images": [f"media/{n}.jpg"]}
                     for n in range(24)],
        "text": [{"domain": "text", "text": sentence(n, 20 + 5 * (n % 8))} for n in range(40)],
        "clips": [{"domain": "video", "text": sentence(n, 9), "videos": [f"media/{n}.mp4"]} for n in range(3)],
        "chats": [{"domain": "chat", "thinking": bool(n % 2), "images": [f"media/{n}.jpg"], "messages": [
            {"role": "user", "content": f"<image>{sentence(n, 5)}?"},
            {"role": "assistant", "content": sentence(n + 1, 7),
             **({"reasoning_content": sentence(n, 6)} if n % 2 else {})}]} for n in range(12)],
    }  # fmt: skip
    for name, lines in records.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert not build_shards([file], folder / name, tokenizer=tokenizer_folder).counts.rejected
    return folder


@pytest.fixture
def config_file(shards: Path, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A run of 6 steps that takes seconds."""
    content = {
        "model": {"preset": "tiny_moe"},
        "data": {
            "tokenizer": str(tokenizer_folder),
            "sources": [{"path": str(shards / name)} for name in ("pictures", "text", "clips")],
            "image_max_tokens": 16,
            "video_max_tokens": 60,
            "num_workers": 1,
        },
        "train": {"steps": 6, "global_batch_size": 4, "seq_length": 128, "output_dir": str(tmp_path / "run"),
                  "precision": "fp32"},
        "optimizer": {"lr": 2e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "checkpoint": {"save_interval": 3},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    return path
