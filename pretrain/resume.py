"""Continuing a run: from where, and whether its configuration still means the same run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.checkpoint import latest_checkpoint, read_train_state
from model.config import ConfigError
from pretrain.config import RunConfig

# What decides the model and the plan of data. Every other key may change when a run continues.
FIXED = ("model.", "train.global_batch_size", "train.seq_length", "data.sources", "data.seed", "data.tokenizer",
         "data.image_max_tokens", "data.video_max_tokens", "data.segment_multiple")  # fmt: skip


def checkpoint_to_resume(config: RunConfig, resolved: dict[str, Any]) -> Path | None:
    """The checkpoint that this run continues from, or None for a new run.

    Raises:
        ConfigError: the folder holds a run that may not be continued, or one of another configuration.
    """
    folder = Path(config.train.output_dir)
    if config.checkpoint.resume == "never":
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"train.output_dir={folder} holds a run and checkpoint.resume=never; choose another folder, or "
                "checkpoint.resume=auto to continue it"
            )
        return None
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None and not config.checkpoint.allow_changes:
        refuse_changes(read_train_state(checkpoint).config, resolved, folder)
    return checkpoint


def refuse_changes(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    old, new = dict(_flatten(before)), dict(_flatten(now))
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(FIXED) and old.get(key) != new.get(key):
            raise ConfigError(
                f"{key} was {old.get(key)!r} in the run at {folder} and is {new.get(key)!r} now; put it back, choose "
                "another train.output_dir, or set checkpoint.allow_changes=true"
            )


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
