"""Files that are whole or not there, and of which one of many writers has its way."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from common.files import write_first

pytestmark = pytest.mark.fast


def test_of_many_that_write_at_once_one_has_its_way(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for turn in range(2):
        together, told = fork.Barrier(5), fork.Queue()

        def member(number: int, path: Path = tmp_path / str(turn), together=together, told=told) -> None:
            together.wait()
            told.put(write_first(path, f"{number} " * 9999))

        members = [fork.Process(target=member, args=(number,)) for number in range(5)]
        for process in members:
            process.start()
        found = {told.get(timeout=60) for _ in members}
        for process in members:
            process.join()
        assert found == {(tmp_path / str(turn)).read_text()}
        assert write_first(tmp_path / str(turn), "too late") in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what exFAT says

    monkeypatch.setattr(os, "link", no_links)
    assert [write_first(tmp_path / "file", text) for text in ("first", "second")] == ["first", "first"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
