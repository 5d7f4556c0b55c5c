"""A small task, and a model that has learned the form of its answers, for runs of reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo.digits import build
from tests.rl.digit_runs import learn_to_answer, write_config


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tokenizer and shards: 48 chats, 64 prompts, and the rest held out."""
    folder = tmp_path_factory.mktemp("digits")
    build(folder, chats=48, prompts=64, held_out=16)
    return folder


@pytest.fixture(scope="session")
def start_model(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to answer, and some of the digits."""
    run = tmp_path_factory.mktemp("start") / "run"
    learn_to_answer(digits, run)
    return run


@pytest.fixture(scope="module")
def rl_config(digits: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes the configuration of a short run."""
    files = tmp_path_factory.mktemp("configs")

    def write(folder: Path, **changes: Any) -> Path:
        return write_config(digits, start_model, folder, files / f"{len(list(files.iterdir()))}.yaml", **changes)

    return write
