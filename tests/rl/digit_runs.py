"""Runs on handwritten digits (demo.digits): a model that has learned to answer, and what learns from rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.launch import ROOT, train


def learn_to_answer(digits: Path, run: Path, *keys: str) -> None:
    """Train a model that has learned to answer, and some of the digits."""
    config = ROOT / "configs" / "tiny" / "rl_start.yaml"
    short = ["train.steps=60", "train.global_batch_size=1", "train.seq_length=1024"]
    data = [f"data.tokenizer={digits}/tokenizer", f"data.sources=[{{path: {digits}/shards/chats}}]"]
    train(config, [*short, *data, f"train.output_dir={run}", *keys], processes=1)


def write_config(digits: Path, start_model: Path, run: Path, file: Path, **changes: Any) -> Path:
    """Write the configuration of a short run, and return the file."""
    content = yaml.safe_load((ROOT / "configs" / "tiny" / "rl.yaml").read_text())
    content["model"] = {"init_from": str(start_model)}
    content["data"] |= {
        "tokenizer": str(digits / "tokenizer"),
        "sources": [{"path": str(digits / "shards" / "prompts")}],
    }
    content["train"] |= {"steps": 4, "output_dir": str(run)}
    content["rl"] = {"prompts": 6, "group": 4, "updates": 2}
    content["validation"] = {"sources": [{"path": str(digits / "shards" / "held_out")}], "interval": 2}
    content["checkpoint"] = {"save_interval": 2}
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value}
    file.write_text(yaml.safe_dump(content))
    return file
