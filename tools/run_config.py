"""Reads the configuration of a run, whichever stage it is of; and refuses one that a tool is not made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from model.config import ConfigError
from rl.config import RlConfig
from training.config import COMMANDS, RunConfig, load_config
from training.recipe import last_value, read_layers

# Sections of reinforcement learning alone.
RL_SECTIONS = {item.name for item in fields(RlConfig)} - {item.name for item in fields(RunConfig)}


def load_run(files: Path | Sequence[Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration: an RlConfig for reinforcement learning, a RunConfig for all other stages.

    Raises:
        ConfigError, DataError: as training.config.load_config.
    """
    return load_config(RlConfig if is_rl(files, overrides) else RunConfig, files, overrides)


def is_rl(files: Path | Sequence[Path], overrides: Sequence[str] = ()) -> bool:
    """Return whether a configuration is one of reinforcement learning: by train.stage, or by its sections.

    Raises:
        ConfigError: a file or an override cannot be read.
    """
    layers = read_layers([files] if isinstance(files, Path) else files, overrides)
    if stage := last_value(layers, "train", "stage"):
        return COMMANDS.get(str(stage)) == RlConfig.command
    return any(RL_SECTIONS & set(layer.plain) for layer in layers if isinstance(layer.plain, dict))


def refuse_rl(files: Path | Sequence[Path], overrides: Sequence[str], why: str) -> None:
    """Refuse a configuration of reinforcement learning.

    Args:
        files: of the run.
        overrides: of their keys.
        why: what such a run does not have, and which command to use.

    Raises:
        ConfigError: it is one.
    """
    if is_rl(files, overrides):
        named = files if isinstance(files, Path) else files[0]
        raise ConfigError(f"{named} is a run of reinforcement learning: {why}")
