"""Between a Hugging Face folder and a checkpoint that loads at any layout.

    python -m tools.convert import --hf DIR --out CKPT
    python -m tools.convert export --checkpoint CKPT --out DIR [--dtype bf16|fp32|keep] [--max-shard-size 5GB]
    python -m tools.convert verify DIR_A DIR_B

One process on the CPU holds the whole model: have memory for its weights once. CKPT is a step folder, or a run's
folder for its newest step. What an import brings beside the weights (tokenizer, chat template, preprocessors) an export
gives back. Import and export change no bit of a float32 or bfloat16 folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model need not fit a GPU; said before torch looks for one

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from common.files import write_json
from model.checkpoint import (
    HF_FILES,
    CheckpointError,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from model.config import ARCHITECTURES, ConfigError, GlmvConfig
from model.hf_weights import check_names_and_shapes, export_tensors, hf_shapes
from model.safetensors_folder import SafetensorsFolder, SafetensorsWriter, WeightsError, parse_size
from model.stored_weights import stored_dtype
from model.whole_model import build_whole_model
from tools.errors import errors_in_one_line
from training.distributed import process_group
from training.hf_files import TOKENIZER_FILES

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()

HF_FILE_NAMES = ("config.json", "generation_config.json", "preprocessor_config.json",
                   "video_preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIG_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}  # of dtypes in a config.json
SHOWN_DIFFERENCES = 40
KEPT_IN_FLOAT32 = "e_score_correction_bias"  # published so whatever the other tensors are


class ConvertError(ValueError):
    """A call that cannot be carried out; the message names the folder or option and the mend."""


# --- import -----------------------------------------------------------------------------------------------------------


@app.command("import")
def import_command(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder of GLM-4.5V or GLM-4.1V")],
    out: Annotated[Path, typer.Option(help="checkpoint to make; must not exist, or be empty")],
) -> None:
    """Hugging Face folder -> checkpoint."""
    with errors_in_one_line(CheckpointError, ConfigError, ConvertError, WeightsError):
        import_folder(hf, out)
    console.print(f"imported {hf} into {out}", markup=False, soft_wrap=True)


def import_folder(hf: Path, out: Path) -> None:
    """Make a checkpoint of a Hugging Face folder's weights.

    They are kept in bfloat16 if the folder's are, else in float32. Raises ConvertError, ConfigError for another
    architecture, WeightsError for weights that do not fit config.json.
    """
    _refuse_full(out)
    config = GlmvConfig.from_hf(hf)
    source = SafetensorsFolder(hf)
    check_names_and_shapes(source, hf_shapes(config))  # before the minutes that building and reading take
    with process_group(), _progress("reading tensors", len(source.names())) as progress:
        model = build_whole_model(config, _Watched(source, progress), dtype=_dtype_of(source))
        save_checkpoint(out, [model], hf_files=lambda folder: _copy_hf_files(hf, folder))


def _dtype_of(source: SafetensorsFolder) -> torch.dtype:
    """bfloat16 where every tensor is; float32 otherwise, which loses nothing of any mixture."""
    dtypes = {source.dtype(name) for name in source.names() if not name.endswith(KEPT_IN_FLOAT32)}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


class _Watched:
    """A source of weights that moves a progress bar."""

    def __init__(self, source: SafetensorsFolder, progress: Progress) -> None:
        self.source, self.progress = source, progress
        self.names, self.shape = source.names, source.shape

    def tensor(self, name: str) -> Tensor:
        self.progress.advance(self.progress.task_ids[0])
        return self.source.tensor(name)


# --- export -----------------------------------------------------------------------------------------------------------


@app.command("export")
def export_command(
    checkpoint: Annotated[Path, typer.Option(help="checkpoint, or a run's folder for its newest")],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to make; must not exist, or be empty")],
    dtype: Annotated[str, typer.Option(help="bf16, fp32, or keep: as the checkpoint has them")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="largest file of weights")] = "5GB",
) -> None:
    """Checkpoint -> Hugging Face folder."""
    with errors_in_one_line(CheckpointError, ConfigError, ConvertError, WeightsError):
        export_checkpoint(checkpoint, out, dtype=dtype, max_shard_bytes=parse_size(max_shard_size))
    console.print(f"exported {checkpoint} into {out}", markup=False, soft_wrap=True)


def export_checkpoint(checkpoint: Path, out: Path, *, dtype: str = "keep", max_shard_bytes: int = 5 * 10**9) -> None:
    """Make a Hugging Face folder of a checkpoint, under a temporary name until it is whole.

    Raises ConvertError, CheckpointError for a folder that is no checkpoint or not safe to read.
    """
    if dtype not in (*DTYPES, "keep"):
        raise ConvertError(f"--dtype {dtype} is unknown: use bf16, fp32 or keep")
    _refuse_full(out)
    path = find_checkpoint(checkpoint)
    config = GlmvConfig.from_hf(path / HF_FILES)
    stored = stored_dtype(path)
    wanted = DTYPES.get(dtype, stored)
    out.parent.mkdir(parents=True, exist_ok=True)
    with process_group(), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as unfinished:
        folder = Path(unfinished) / out.name
        folder.mkdir()
        model = build_whole_model(config, dtype=stored)
        load_checkpoint(path, [model])
        writer = SafetensorsWriter(folder, max_shard_bytes)
        with _progress("writing tensors", len(hf_shapes(config))) as progress:
            for name, tensor in export_tensors(model):
                writer.add(name, tensor.to(torch.float32 if name.endswith(KEPT_IN_FLOAT32) else wanted))
                progress.advance(progress.task_ids[0])
        writer.close()
        _copy_hf_files(path / HF_FILES, folder)
        write_json(folder / "config.json", _config_json(path / HF_FILES, config, wanted))
        folder.rename(out)


def _config_json(hf_files: Path, config: GlmvConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The checkpoint's config.json with the architecture and the dtype of this export."""
    content: dict[str, Any] = json.loads((hf_files / "config.json").read_text())
    content["architectures"] = [ARCHITECTURES[config.variant]]
    # transformers 4 calls it torch_dtype, and may repeat it for the parts.
    for part in (content, content["text_config"], content["vision_config"]):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                part[key] = CONFIG_NAMES[dtype]
    if content.get("torch_dtype") is None:
        content["dtype"] = CONFIG_NAMES[dtype]
    return content


# --- verify -----------------------------------------------------------------------------------------------------------


@app.command("verify")
def verify_command(
    dir_a: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    dir_b: Annotated[Path, typer.Argument(help="Hugging Face folder")],
) -> None:
    """Compare two Hugging Face folders; exits with 1 if anything differs."""
    with errors_in_one_line(CheckpointError, ConfigError, ConvertError, WeightsError):
        differences = list(compare_folders(dir_a, dir_b))
        tensors = len(SafetensorsFolder(dir_a).names())
    if not differences:
        console.print(f"equal: {tensors:,} tensors bit for bit, configuration and hf_files")
        return
    table = Table(box=None)
    for title in ("what differs", str(dir_a), str(dir_b)):
        table.add_column(escape(title), overflow="fold")
    for row in differences[:SHOWN_DIFFERENCES]:
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(f"differences: {len(differences):,}, of which shown: {min(len(differences), SHOWN_DIFFERENCES)}")
    raise typer.Exit(1)


def compare_folders(dir_a: Path, dir_b: Path) -> Iterator[tuple[str, str, str]]:
    """Differences of two Hugging Face folders: what, and how it is in one and in the other.

    Tensors are compared bit by bit, however they are spread over files; JSON by content, but for the version of
    transformers that wrote it; other hf_files byte by byte.
    """
    for folder in (dir_a, dir_b):
        if is_checkpoint(folder):
            raise ConvertError(f"{folder} is a checkpoint; export it first, verify compares Hugging Face folders")
    a, b = SafetensorsFolder(dir_a), SafetensorsFolder(dir_b)
    names = sorted({*a.names(), *b.names()})
    with _progress("comparing tensors", len(names)) as progress:
        for name in names:
            yield from _compare_tensor(name, a, b)
            progress.advance(progress.task_ids[0])
    for name in dict.fromkeys(HF_FILE_NAMES):
        yield from _compare_file(name, dir_a / name, dir_b / name)


def _compare_tensor(name: str, a: SafetensorsFolder, b: SafetensorsFolder) -> Iterator[tuple[str, str, str]]:
    here, there = name in a, name in b
    if not (here and there):
        yield name, "present" if here else "missing", "present" if there else "missing"
        return
    form_a, form_b = ((list(folder.shape(name)), str(folder.dtype(name))[6:]) for folder in (a, b))
    if form_a != form_b:
        yield name, "{} {}".format(*form_a), "{} {}".format(*form_b)
        return
    x, y = a.tensor(name), b.tensor(name)
    unequal = x.view(torch.uint8) != y.view(torch.uint8)
    if unequal.any():
        values = unequal.unflatten(-1, (-1, x.element_size())).any(-1)
        largest = (x.double() - y.double()).abs().max().item()
        yield name, f"{int(values.sum()):,} of {x.numel():,} values differ", f"by {largest:.3g} at most"


def _compare_file(name: str, a: Path, b: Path) -> Iterator[tuple[str, str, str]]:
    if not (a.is_file() and b.is_file()):
        if a.is_file() or b.is_file():
            yield name, "present" if a.is_file() else "missing", "present" if b.is_file() else "missing"
    elif name.endswith(".json"):
        flat_a, flat_b = (dict(_flatten(json.loads(path.read_text()))) for path in (a, b))
        for key in sorted({*flat_a, *flat_b} - {"transformers_version"}):
            if flat_a.get(key) != flat_b.get(key):
                yield f"{name}: {key}", str(flat_a.get(key, "absent")), str(flat_b.get(key, "absent"))
    elif a.read_bytes() != b.read_bytes():
        yield name, "bytes differ", "bytes differ"


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested objects as dotted keys with their values written as JSON, so that 1, true and "1" stay apart."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, json.dumps(content, sort_keys=True)


# --- shared -----------------------------------------------------------------------------------------------------------


def _copy_hf_files(source: Path, folder: Path) -> None:
    for name in HF_FILE_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} exists and is not empty: choose another --out, or remove it")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Progress]:
    """A bar on stderr of one task."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=total)
        yield progress


if __name__ == "__main__":
    app()
