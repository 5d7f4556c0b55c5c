"""Folders that transformers wrote, their checkpoints and their exports, for tests of conversions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.hf_folders import save_whole_folder
from tools.comparison import TensorDifference, compare_files, compare_tensors, open_sides
from tools.conversion import export_checkpoint, import_folder
from tools.convert import app

CASES = {
    "moe_fp32": ("glm4v_moe", torch.float32),
    "moe_bf16": ("glm4v_moe", torch.bfloat16),
    "dense_fp32": ("glm4v", torch.float32),
    "flash_bf16": ("glm46v", torch.bfloat16),
}
# Files that published folders may have beside those that the tests write. No test reads them.
OTHER_FILES = (
    "generation_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)
HALF = "moe_fp32_exported_as_bf16"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as transformers writes them, their checkpoints under checkpoints/ and their exports under exports/."""
    root = tmp_path_factory.mktemp("folders")
    for case, (variant, dtype) in CASES.items():
        save_whole_folder(variant, root / case, dtype=dtype)
    for name in OTHER_FILES:
        (root / "flash_bf16" / name).write_text('{"kept": "byte for byte"}\n')
    for case in CASES:
        import_folder(root / case, root / "checkpoints" / case)
        export_checkpoint(root / "checkpoints" / case, root / "exports" / case)
    export_checkpoint(root / "checkpoints/moe_fp32", root / "exports" / HALF, dtype="bf16", max_shard_bytes=1_000_000)
    return root


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Call tools.convert and return its exit status, standard output and standard error."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or repository,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )


def differences(a: Path, b: Path) -> list[TensorDifference | tuple[str, str, str]]:
    sides = open_sides(a, b)
    return [*compare_tensors(*sides), *compare_files(*(side.files for side in sides))]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.visual.downsample.bias"][5] += 0.25
