"""Where a run starts: from its own newest checkpoint, from another model's weights, or from random ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.checkpoint import (
    HF_FILES,
    STATE,
    CheckpointError,
    find_checkpoint,
    is_checkpoint,
    latest_checkpoint,
    read_train_state,
)
from model.config import ConfigError, GlmvConfig
from training.config import RunConfig

# What decides the model and the plan of data. Every other key may change when a run continues.
FIXED = ("model.preset", "model.init_from", "train.global_batch_size", "train.seq_length", "data.sources", "data.seed",
         "data.tokenizer", "data.image_max_tokens", "data.video_max_tokens", "data.segment_multiple")  # fmt: skip
RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class StartPoint:
    """`resume`: a checkpoint to continue, with its optimizer and data counters. `weights`: a checkpoint or a Hugging
    Face folder to take weights from. Neither: random weights."""

    resume: Path | None = None
    weights: Path | None = None

    @property
    def folder(self) -> Path | None:
        return self.resume or self.weights

    @property
    def hf_files(self) -> Path | None:
        """Where the folder keeps its config.json and the like."""
        if self.folder is None:
            return None
        inside = self.folder / HF_FILES
        return inside if inside.is_dir() else self.folder


def find_start_point(config: RunConfig, resolved: dict[str, Any]) -> StartPoint:
    """Look at the folders that `config` names. `resolved` is the configuration as it is kept with a run.

    Raises:
        ConfigError: the output folder holds a run that may not be continued or cannot be written, or
            `model.init_from` is nothing to start from.
    """
    folder = Path(config.train.output_dir)
    _refuse_unusable(folder)
    if config.checkpoint.resume == "never":
        if (folder / RUN_CONFIG).exists() or (folder / "checkpoints").exists():
            raise ConfigError(
                f"train.output_dir={folder} holds a run and checkpoint.resume=never; choose another folder, or "
                "checkpoint.resume=auto to continue it"
            )
        return StartPoint(weights=_weights(config.model.init_from))
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return StartPoint(weights=_weights(config.model.init_from))
    before = read_train_state(checkpoint)
    if before.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is below step {before.step}, which the run at {folder} has reached; "
            "raise it, or choose another train.output_dir"
        )
    _refuse_another_freeze(before.config, config.freeze, folder)
    if not config.checkpoint.allow_changes:
        _refuse_changes(before.config, resolved, folder)
    return StartPoint(resume=checkpoint)


def _weights(init_from: str) -> Path | None:
    if not init_from:
        return None
    path = Path(init_from)
    if is_checkpoint(path):
        return find_checkpoint(path)
    if (path / "config.json").is_file():
        return path
    raise ConfigError(
        f"model.init_from={path} is neither a checkpoint, nor a run's folder with one, nor a Hugging Face folder"
    )


def _refuse_unusable(folder: Path) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"train.output_dir={folder} cannot be written: {existing} is not a folder one may write to")
    if (folder / "config.json").exists() or (folder / STATE).exists():
        raise ConfigError(f"train.output_dir={folder} is the folder of a model, not of a run; choose another")


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    old, new = dict(_flatten(before)), dict(_flatten(now))
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(FIXED) and old.get(key) != new.get(key):
            place, was, is_now = _difference(key, old.get(key), new.get(key))
            raise ConfigError(
                f"{place} was {was!r} in the run at {folder} and is {is_now!r} now; put it back, choose "
                "another train.output_dir, or set checkpoint.allow_changes=true"
            )


def _refuse_another_freeze(before: dict[str, Any], freeze: list[str], folder: Path) -> None:
    """The checkpoint holds optimizer state of what was trained, and of nothing else."""
    frozen = before.get("freeze", [])
    if set(frozen) != set(freeze):
        raise ConfigError(
            f"freeze was {frozen} in the run at {folder} and is {freeze} now, and what is not trained has no state in "
            "the optimizer; put it back, or begin another run from this one's weights: model.init_from="
            f"{folder}, and another train.output_dir"
        )


def _difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first place within lists and mappings of one shape where two values differ: data.sources[2].path."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}[{place}]", *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    elif isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        pairs = [(f"{key}.{name}", old[name], new[name]) for name in old]
    else:
        return key, old, new
    return _difference(*next(pair for pair in pairs if pair[1] != pair[2]))


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolve_model(preset_name: str, origin: StartPoint) -> GlmvConfig:
    """The model that the preset, if one is named, and the folder to start from, if there is one, agree on."""
    preset = GlmvConfig.from_preset(preset_name) if preset_name else None
    if origin.hf_files is None:
        assert preset is not None
        return preset
    found = GlmvConfig.from_hf(origin.hf_files)
    if preset is not None and preset != found:
        raise ConfigError(
            f"model.preset={preset_name} is another model than the one in {origin.folder}; leave model.preset empty to "
            "take that one"
        )
    return found


def agree_on_start_point(origin: StartPoint) -> StartPoint:
    """The main process's choice, on every process. Collective. What a process finds by itself may differ: file systems
    show new files late, and a run that `model.init_from` names may save meanwhile.

    Raises:
        CheckpointError: on all processes, if one of them does not see the chosen folder.
    """
    choice = [origin]
    dist.broadcast_object_list(choice, src=0)
    missing = torch.tensor(float(choice[0].folder is not None and not choice[0].folder.is_dir()))
    missing = missing.to(torch.cuda.current_device())
    dist.all_reduce(missing)
    if missing:
        raise CheckpointError(
            f"{choice[0].folder} is not seen by {int(missing)} of {dist.get_world_size()} processes: train.output_dir "
            "and model.init_from must be on a file system that all nodes share"
        )
    return choice[0]
