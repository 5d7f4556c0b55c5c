"""Errors that a user can fix: each is printed once, by the process that should print it."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import ConfigError
from tests.launch import fail
from tests.training_data import config_file, shards
from training import errors
from training.errors import expected_errors

__all__ = ["config_file", "shards"]


def test_error_that_all_processes_find_is_printed_once_although_the_main_process_is_the_last(config_file: Path) -> None:
    [error] = fail(config_file, ["train.steps=0"], entry="tests.training.late_train")
    assert error == "train.steps=0: give a positive number"


def test_error_that_one_process_alone_finds_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(errors, "GRACE_SECONDS", 0.0)
    with pytest.raises(SystemExit, match="2"), expected_errors(on_every_process=False):
        raise ConfigError("this folder is not on this machine")
    assert capsys.readouterr().err == "error on rank 1: this folder is not on this machine\n"
