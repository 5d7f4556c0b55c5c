"""tools.check_node on machines that lack something."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools.check_node import app


def check(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return done.exit_code, done.stdout


@pytest.fixture(autouse=True)
def name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")


def test_machine_in_order_says_so(tmp_path: Path) -> None:
    code, output = check("--output-dir", tmp_path / "not" / "there", "--min-disk", "1MiB", "--min-shm", "1MiB")
    assert (code, output) == (0, "node node7: imports, 0 GPUs, shared memory and disk are in order\n")
    assert list(tmp_path.iterdir()) == []


def test_every_fault_is_named(tmp_path: Path) -> None:
    code, output = check("--output-dir", tmp_path, "--min-disk", "900TiB", "--min-shm", "900T", "--gpus", 2)
    assert code == 1
    lines = output.splitlines()
    assert all(line.startswith("bad node node7: ") for line in lines)
    assert [line.split(": ")[1].split(" has ")[0] for line in lines] == [
        "0 GPUs are seen, and the job wants 2",
        "/dev/shm",
        str(tmp_path),
    ]


def test_folder_that_takes_no_file_is_a_fault() -> None:
    code, output = check("--output-dir", "/proc/self", "--min-disk", "1MiB", "--min-shm", "1MiB")
    assert (code, output.startswith("bad node node7: /proc/self cannot be written: ")) == (1, True)
