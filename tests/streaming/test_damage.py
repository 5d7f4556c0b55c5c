"""Whatever is wrong with weights is found: the file and, where it is in a tensor, the tensor are named."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.hf_folders import save_whole_folder
from tools.convert import app


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers, its checkpoint, and the export of that."""
    root = tmp_path_factory.mktemp("damage")
    save_whole_folder("glm4v_moe", root / "given")
    convert("import", "--hf", root / "given", "--out", root / "checkpoint")
    convert("export", "--checkpoint", root / "checkpoint", "--out", root / "hf", "--max-shard-size", "1MB")
    return root


def convert(*arguments: object) -> str:
    """Run tools.convert; return its error, or an empty string."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--processes", "1"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stderr if result.exit_code else ""


# --- what may happen to a file ----------------------------------------------------------------------------------------


def flip_a_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def extend(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 9000)))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap_blocks(path: Path, rng: random.Random) -> None:
    """Two blocks of the file, as after a copy that was resumed at the wrong place."""
    data = bytearray(path.read_bytes())
    size = min(512, len(data) // 4)
    a, b = rng.randrange(0, len(data) // 2 - size), rng.randrange(len(data) // 2, len(data) - size)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    if bytes(data) == path.read_bytes():
        data[a] ^= 255
    path.write_bytes(data)


ANYTHING: list[Callable[[Path, random.Random], None]] = [flip_a_bit, truncate, extend, remove, swap_blocks]


# --- what may be wrong with a header ----------------------------------------------------------------------------------


def change_header(path: Path, change: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rename_tensor(path: Path, rng: random.Random) -> None:
    def change(header: dict) -> None:
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name + "_"] = header.pop(name)

    change_header(path, change)


def reshape_tensor(path: Path, rng: random.Random) -> None:
    def change(header: dict) -> None:
        name = rng.choice([name for name, entry in header.items() if len(entry.get("shape", ())) >= 2])
        shape = header[name]["shape"]
        shape[0], shape[1] = (shape[1], shape[0]) if shape[0] != shape[1] else (2 * shape[0], shape[1] // 2)

    change_header(path, change)


def other_dtype(path: Path, rng: random.Random) -> None:
    def change(header: dict) -> None:
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name]["dtype"] = {"F32": "I32", "BF16": "F16"}[header[name]["dtype"]]

    change_header(path, change)


OF_HEADERS: list[Callable[[Path, random.Random], None]] = [rename_tensor, reshape_tensor, other_dtype]


# --- tests ------------------------------------------------------------------------------------------------------------

FEW, MANY = 8, pytest.param(60, marks=pytest.mark.slow)  # of each kind


@pytest.mark.parametrize("count", [FEW, MANY])
def test_damaged_folder_is_not_imported(count: int, folders: Path, tmp_path: Path) -> None:
    rng = random.Random(count)
    weights = sorted(path.name for path in (folders / "hf").glob("*.safetensors"))
    for number in range(count * len(ANYTHING + OF_HEADERS)):
        hf = tmp_path / "hf"
        shutil.copytree(folders / "hf", hf)
        damage = (ANYTHING + OF_HEADERS)[number % len(ANYTHING + OF_HEADERS)]
        file = rng.choice(weights)
        damage(hf / file, rng)
        error = convert("import", "--hf", hf, "--out", tmp_path / "out")
        check(error, file, damage.__name__, number)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".unfinished*"))
        shutil.rmtree(hf)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_damaged_checkpoint_is_not_exported(count: int, folders: Path, tmp_path: Path) -> None:
    rng = random.Random(count)
    files = sorted(path.relative_to(folders / "checkpoint") for path in (folders / "checkpoint").rglob("*.*"))
    for number in range(count * len(ANYTHING)):
        checkpoint = tmp_path / "checkpoint"
        shutil.copytree(folders / "checkpoint", checkpoint)
        damage, file = ANYTHING[number % len(ANYTHING)], rng.choice(files)
        damage(checkpoint / file, rng)
        error = convert("export", "--checkpoint", checkpoint, "--out", tmp_path / "out")
        check(error, file.name, damage.__name__, number)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".unfinished*"))
        shutil.rmtree(checkpoint)


def check(error: str, file: str, damage: str, number: int) -> None:
    case = f"case {number}, {damage} of {file}"
    assert error.startswith("error: "), f"{case}: accepted"
    assert error.count("\n") == 1, f"{case}: {error}"
    named = re.search(r"tensors? |manifest\.json|" + re.escape(file), error)
    assert named, f"{case}: {error}"
