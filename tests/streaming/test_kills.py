"""kill -9 at any moment: nothing that loads is left behind, and the same command completes with the same bytes."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.streaming.wide import save_wide, wide_config

CONVERT = [sys.executable, "-m", "tools.convert"]
SMALL_BLOCKS = [sys.executable, "-m", "tests.streaming.small_blocks"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 MB, its checkpoint and its export, which no kill disturbed."""
    root = tmp_path_factory.mktemp("kills")
    save_wide(wide_config("tiny_moe", layers=24, vision_layers=8, vocab_size=100_000), root / "hf", 1000)
    subprocess.run(command("import", root / "hf", root / "checkpoint"), check=True)
    subprocess.run(command("export", root / "checkpoint", root / "exported"), check=True)
    return root


def command(kind: str, source: Path, out: Path) -> list[str]:
    read = {"import": "--hf", "export": "--checkpoint"}[kind]
    return [*SMALL_BLOCKS, kind, read, str(source), "--out", str(out)]


def content(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [("import", 1), *(pytest.param(kind, 10, marks=pytest.mark.slow) for kind in ("import", "export"))],
)
def test_killed_conversion_is_resumed(kind: str, rounds: int, folders: Path, tmp_path: Path) -> None:
    source, expected = {"import": ("hf", "checkpoint"), "export": ("checkpoint", "exported")}[kind]
    rng = random.Random(rounds)
    resumed = 0
    for number in range(rounds):
        out = tmp_path / f"{number}"
        portions = out.with_name(f".unfinished_{out.name}") / ".portions"
        process = psutil.Popen(command(kind, folders / source, out))
        wait_for(portions / "identity.json", process)
        time.sleep(rng.uniform(0.0, 1.0))
        below = process.children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(below, timeout=10)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in below)
        complete = len(list(portions.glob("[0-9]*.json")))
        if not out.exists():  # it may have been complete
            resumed += complete > 0
            subprocess.run(command(kind, folders / source, out), check=True)
        assert content(out) == content(folders / expected)
        assert not portions.parent.exists()
        shutil.rmtree(out)
    assert resumed or rounds < 10


def wait_for(path: Path, process: psutil.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_process_is_reported_and_resumed(folders: Path, tmp_path: Path) -> None:
    """As by the kernel, when the machine is out of memory."""
    out = tmp_path / "out"
    process = psutil.Popen(command("import", folders / "hf", out), stderr=subprocess.PIPE, text=True)
    wait_for(out.with_name(".unfinished_out") / ".portions" / "0.json", process)
    process.children()[0].kill()
    error = process.communicate()[1]
    assert process.returncode == 2
    assert error == (
        "error: a process of the conversion was killed by SIGKILL, perhaps because the machine was out of memory; the "
        "same command resumes it\n"
    )
    (out.with_name(".unfinished_out") / "manifest.json.0123456789ab.tmp").write_text("{")  # as a kill leaves it
    subprocess.run(command("import", folders / "hf", out), check=True)
    assert content(out) == content(folders / "checkpoint")


@pytest.mark.slow
def test_changed_source_is_converted_from_the_beginning(folders: Path, tmp_path: Path) -> None:
    hf, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(folders / "hf", hf)
    process = psutil.Popen(command("import", hf, out))
    wait_for(out.with_name(".unfinished_out") / ".portions" / "0.json", process)
    process.kill()
    process.wait()
    path = min(hf.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    subprocess.run(command("import", hf, out), check=True)
    subprocess.run(command("export", out, tmp_path / "exported"), check=True)
    subprocess.run([*CONVERT, "verify", str(hf), str(tmp_path / "exported")], check=True)


@pytest.mark.slow
def test_two_conversions_do_not_write_one_folder(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = psutil.Popen(command("import", folders / "hf", out))
    wait_for(out.with_name(".unfinished_out") / ".portions" / "0.json", first)
    first.suspend()
    second = subprocess.run(command("import", folders / "hf", out), capture_output=True, text=True, check=False)
    first.resume()
    assert second.returncode == 2
    assert second.stderr.startswith("error: another conversion is writing")
    assert first.wait() == 0
    assert content(out) == content(folders / "checkpoint")
