"""Errors of writing name the file: of shards, indexes and reports, in this process and in workers."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_pipeline.inputs.reading import JPEG

LIMIT = 20_000  # bytes of a file


@pytest.mark.parametrize("executor", ["here", "processes"])
def test_file_that_cannot_be_written_is_named(tmp_path: Path, executor: str) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(JPEG)
        (tmp_path / "in" / f"{number}.txt").write_text("A cat.")
    paths = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "tools.shard", "build", *paths, "--executor", executor, "--workers", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
    )
    assert done.returncode == 2
    assert "out-00000-00000.tar: File too large" in done.stderr.splitlines()[-1]
