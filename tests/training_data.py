"""Fixtures: small real shards, and the configuration of a run on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

TEXT = "a small red house by the wide river under old trees where two grey birds sing all day"


def sentence(seed: int, length: int) -> str:
    words = TEXT.split()
    return " ".join(words[(seed * 7 + 3 * i * i + i) % len(words)] for i in range(length))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder of sources: images with captions, text, videos, and chats in the form of each model."""
    folder = tmp_path_factory.mktemp("shards")
    media = folder / "media"
    media.mkdir()
    for n in range(24):
        (media / f"{n}.jpg").write_bytes(encoded(pattern(60 + 9 * (n % 5), 80 + 11 * (n % 7), seed=n)))
    for n in range(3):
        (media / f"{n}.mp4").write_bytes(encoded_video(frames=16 + 8 * n))
    records: dict[str, list[dict[str, object]]] = {
        "images": [
            {"domain": "image_text", "text": sentence(n, 8 + n % 9), "images": [f"media/{n}.jpg"]} for n in range(24)
        ],
        "text": [{"domain": "text", "text": sentence(n, 20 + 5 * (n % 8))} for n in range(40)],
        "videos": [{"domain": "video", "text": sentence(n, 9), "videos": [f"media/{n}.mp4"]} for n in range(3)],
        "chats": [chat(n, thinking=bool(n % 2)) for n in range(12)],
        "chats_glm41v": [chat(n, thinking=True) for n in range(12)],
    }
    for name, lines in records.items():
        build(folder / name, lines, tokenizer_folder, chat_form="glm41v" if name == "chats_glm41v" else "glm45v")
    return folder


def chat(n: int, thinking: bool) -> dict[str, object]:
    """Make the record of a question about an image and its answer."""
    answer = {"role": "assistant", "content": sentence(n + 1, 7)}
    if thinking:
        answer["reasoning_content"] = sentence(n, 6)
    messages = [{"role": "user", "content": f"<image>{sentence(n, 5)}?"}, answer]
    return {"domain": "chat", "thinking": thinking, "images": [f"media/{n}.jpg"], "messages": messages}


def build(out: Path, records: Sequence[dict[str, object]], tokenizer: Path, chat_form: str = "glm45v") -> Path:
    """Build a source of these records; their media are named relative to the parent of `out`."""
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert not build_shards([file], out, tokenizer=tokenizer, name=out.name, chat_form=chat_form).counts.rejected
    return out


@pytest.fixture
def config_file(shards: Path, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A run of 6 steps that takes seconds."""
    content = {
        "model": {"preset": "tiny_moe"},
        "data": {
            "tokenizer": str(tokenizer_folder),
            "sources": [{"path": str(shards / name)} for name in ("images", "text", "videos")],
            "image_max_tokens": 16,
            "video_max_tokens": 60,
            "num_workers": 1,
        },
        "train": {
            "steps": 6,
            "global_batch_size": 4,
            "seq_length": 128,
            "output_dir": str(tmp_path / "run"),
            "precision": "fp32",
        },
        "optimizer": {"lr": 2e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "checkpoint": {"save_interval": 3},
    }
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    return path
