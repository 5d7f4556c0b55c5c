"""Files that are complete or absent, and of which the first of many concurrent writers decides the content."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from common.files import write_first

pytestmark = pytest.mark.fast


def test_all_concurrent_writers_get_the_text_of_the_first(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for turn in range(2):
        barrier, returned = fork.Barrier(5), fork.Queue()

        def write(number: int, path: Path = tmp_path / str(turn), barrier=barrier, returned=returned) -> None:
            barrier.wait()
            returned.put(write_first(path, f"{number} " * 9999))

        writers = [fork.Process(target=write, args=(number,)) for number in range(5)]
        for process in writers:
            process.start()
        found = {returned.get(timeout=60) for _ in writers}
        for process in writers:
            process.join()
        assert found == {(tmp_path / str(turn)).read_text()}
        assert write_first(tmp_path / str(turn), "too late") in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_the_first_writer_decides_on_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what exFAT says

    monkeypatch.setattr(os, "link", no_links)
    assert [write_first(tmp_path / "file", text) for text in ("first", "second")] == ["first", "first"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
