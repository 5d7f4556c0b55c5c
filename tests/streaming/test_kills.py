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
import torch

from tests.aimv2_folders import save_aimv2, save_decoder
from tests.processes import Processes
from tests.streaming import adapter_cases
from tests.streaming.wide import save_wide, wide_config

CONVERT = [sys.executable, "-m", "tools.convert"]
SMALL_BLOCKS = [sys.executable, "-m", "tests.streaming.small_blocks"]

# What each conversion reads, by option, and the folder that it makes.
CONVERSIONS = {
    "import": ({"--hf": "hf"}, "checkpoint"),
    "export": ({"--checkpoint": "checkpoint"}, "exported"),
    "assemble": ({"--vision": "vision", "--decoder": "decoder"}, "assembled"),
    "merge": ({"--checkpoint": "adapters"}, "merged"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 MB, its checkpoint and its export, which no kill disturbed."""
    root = tmp_path_factory.mktemp("kills")
    save_wide(wide_config("tiny_moe", layers=24, vision_layers=8, vocab_size=100_000), root / "hf", 1000)
    make(root, "import")
    make(root, "export")
    return root


@pytest.fixture(scope="module")
def assembled(folders: Path) -> Path:
    """Beside them a vision tower, a language model of 100 MB, and the model that is assembled of the two."""
    save_aimv2(folders / "vision")
    save_decoder("glm4_moe", folders / "decoder", vocab_size=100_000, num_hidden_layers=12)
    make(folders, "assemble")
    return folders


@pytest.fixture(scope="module")
def merged(folders: Path) -> Path:
    """Beside them adapters of the folder's model, and the two merged."""
    with Processes(1) as process:
        process.run(
            adapter_cases.save,
            hf_files=str(folders / "hf"),
            init_from=str(folders / "hf"),
            checkpoint=str(folders / "adapters"),
            lora={"rank": 4, "targets": ["all-linear", "experts.*"]},
            dtype=torch.bfloat16,
        )
    make(folders, "merge")
    return folders


def make(root: Path, kind: str) -> None:
    """Convert without a kill."""
    subprocess.run(command(kind, root, root / CONVERSIONS[kind][1]), check=True)


def command(kind: str, root: Path, out: Path) -> list[str]:
    read = [word for option, name in CONVERSIONS[kind][0].items() for word in (option, str(root / name))]
    return [*SMALL_BLOCKS, kind, *read, "--out", str(out)]


def content(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [("import", 1), ("merge", 1), *(pytest.param(kind, 10, marks=pytest.mark.slow) for kind in CONVERSIONS)],
)
def test_killed_conversion_is_resumed(
    kind: str, rounds: int, folders: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind in ("assemble", "merge"):
        request.getfixturevalue(CONVERSIONS[kind][1])
    expected = content(folders / CONVERSIONS[kind][1])
    rng = random.Random(rounds)
    resumed = 0
    for number in range(rounds):
        out = tmp_path / f"{number}"
        portions = out.with_name(f".unfinished_{out.name}") / ".portions"
        process = psutil.Popen(command(kind, folders, out))
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
            subprocess.run(command(kind, folders, out), check=True)
        assert content(out) == expected
        assert list(tmp_path.iterdir()) == [out]
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
    process = psutil.Popen(command("import", folders, out), stderr=subprocess.PIPE, text=True)
    wait_for(out.with_name(".unfinished_out") / ".portions" / "0.json", process)
    process.children()[0].kill()
    error = process.communicate()[1]
    assert process.returncode == 2
    assert error == (
        "error: a process of the conversion was killed by SIGKILL, perhaps because the machine was out of memory; the "
        "same command resumes it\n"
    )
    (out.with_name(".unfinished_out") / "manifest.json.0123456789ab.tmp").write_text("{")  # as a kill leaves it
    subprocess.run(command("import", folders, out), check=True)
    assert content(out) == content(folders / "checkpoint")


@pytest.mark.slow
def test_changed_source_is_converted_from_the_beginning(folders: Path, tmp_path: Path) -> None:
    hf, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(folders / "hf", hf)
    process = psutil.Popen(command("import", tmp_path, out))
    wait_for(out.with_name(".unfinished_out") / ".portions" / "0.json", process)
    process.kill()
    process.wait()
    path = min(hf.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    subprocess.run(command("import", tmp_path, out), check=True)
    subprocess.run([*CONVERT, "export", "--checkpoint", str(out), "--out", str(tmp_path / "exported")], check=True)
    subprocess.run([*CONVERT, "verify", str(hf), str(tmp_path / "exported")], check=True)


@pytest.mark.slow
def test_two_conversions_do_not_write_one_folder(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = psutil.Popen(command("import", folders, out))
    wait_for(out.with_name(".unfinished_out") / ".portions" / "0.json", first)
    first.suspend()
    second = subprocess.run(command("import", folders, out), capture_output=True, text=True, check=False)
    first.resume()
    assert second.returncode == 2
    assert second.stderr.startswith("error: another conversion is writing")
    assert first.wait() == 0
    assert content(out) == content(folders / "checkpoint")
