"""What commands that write a folder for Hugging Face share: options, and the files that belong to the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.files import write_json
from common.sizes import parse_size
from model.hf_config import CONFIG_FILE, remove_quantization
from model.hf_file_names import HF_FILE_NAMES
from model.verify import VERIFY
from model.weights.source import WeightSource

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEPT_IN_FLOAT32 = "e_score_correction_bias"  # published in float32, whatever the other tensors are


class ConvertError(ValueError):
    """A call that cannot be carried out. The message names the folder or option and says how to fix it."""


def check_options(dtype: str, verify: str) -> None:
    """Check options of commands that write a folder.

    Raises:
        ConvertError: One is unknown.
    """
    if dtype not in (*DTYPES, "keep"):
        raise ConvertError(f"--dtype {dtype} is unknown: use bf16, fp32 or keep")
    if verify not in VERIFY:
        raise ConvertError(f"--verify {verify} is unknown: use {' or '.join(VERIFY)}")


def shard_bytes(max_shard_size: str) -> int:
    """Read the option --max-shard-size.

    Raises:
        ConvertError: It is no size.
    """
    try:
        return parse_size(max_shard_size)
    except ValueError as error:
        raise ConvertError(f"--max-shard-size: {error}") from None


def dtype_of(source: WeightSource) -> torch.dtype:
    """Return bfloat16 if every tensor is, else float32, which holds every mixture without loss."""
    dtypes = {source.dtype(name) for name in source.names() if not name.endswith(KEPT_IN_FLOAT32)}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def copy_hf_files(source: Path, folder: Path) -> None:
    """Copy the files that belong to weights, as far as they exist.

    They stay as they are, except for what a config.json says about weights in FP8, which are plain from now on.
    """
    for name in HF_FILE_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if remove_quantization(content):
        write_json(folder / CONFIG_FILE, content)


def refuse_full(out: Path) -> None:
    """Check that a folder can be made.

    Raises:
        ConvertError: It exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} exists and is not empty: choose another --out, or remove it")


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Progress]:
    """Show a progress bar with one task on stderr, if it is a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        progress.add_task(what, total=total)
        yield progress
