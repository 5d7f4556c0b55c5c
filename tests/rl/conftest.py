"""A small task, and a model that has learned the form of its answers, for runs of reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.digits import build
from tests.launch import ROOT, train


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tokenizer and shards: 48 chats, 64 prompts, and the rest held out."""
    folder = tmp_path_factory.mktemp("digits")
    build(folder, chats=48, prompts=64, held_out=16)
    return folder


@pytest.fixture(scope="session")
def start_model(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to answer, and some of the digits."""
    folder = tmp_path_factory.mktemp("start")
    config = ROOT / "configs" / "tiny" / "rl_start.yaml"
    keys = ["train.steps=60", "train.global_batch_size=1", "train.seq_length=1024"]
    train(config, [*keys, *of_digits(digits, "chats"), f"train.output_dir={folder}/run"], processes=1)
    return folder / "run"


def of_digits(digits: Path, name: str) -> list[str]:
    return [f"data.tokenizer={digits}/tokenizer", f"data.sources=[{{path: {digits}/shards/{name}}}]"]


@pytest.fixture(scope="module")
def rl_config(digits: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes the configuration of a short run."""
    folder_of_files = tmp_path_factory.mktemp("configs")

    def write(folder: Path, **changes: Any) -> Path:
        content = yaml.safe_load((ROOT / "configs" / "tiny" / "rl.yaml").read_text())
        content["model"] = {"init_from": str(start_model)}
        content["data"] |= {
            "tokenizer": str(digits / "tokenizer"),
            "sources": [{"path": str(digits / "shards" / "prompts")}],
        }
        content["train"] |= {"steps": 4, "output_dir": str(folder)}
        content["rl"] = {"prompts": 6, "group": 4, "updates": 2}
        content["validation"] = {"sources": [{"path": str(digits / "shards" / "held_out")}], "interval": 2}
        content["checkpoint"] = {"save_interval": 2}
        for key, value in changes.items():
            content[key] = {**content.get(key, {}), **value}
        file = folder_of_files / f"{len(list(folder_of_files.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write
