"""Between Hugging Face folders and checkpoints: import, export, and the comparison of two folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from model.checkpoint import HF_FILES, STATE, find_checkpoint, is_checkpoint, load_checkpoint, save_checkpoint
from model.checkpoint_metadata import stored_dtype
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError, WeightsError
from model.hf_config import CONFIG_FILE, with_one_rope_spelling
from model.weights.folder import SafetensorsFolder
from model.weights.load import check_names_and_shapes, hf_shapes
from model.whole_model import build_whole_model
from tools.hf_output import (
    DTYPES,
    HF_FILE_NAMES,
    ConvertError,
    check_options,
    copy_hf_files,
    dtype_of,
    progress_bar,
    refuse_full,
    write_hf_folder,
)
from training.distributed import process_group

CONVERSION_ERRORS = (CheckpointError, ConfigError, ConvertError, WeightsError)  # that a user can fix


def import_folder(hf: Path, out: Path) -> None:
    """Make a checkpoint of a Hugging Face folder.

    Weights are kept in bfloat16 if all of the folder's are, else in float32.

    Raises:
        ConvertError: `out` is not empty.
        ConfigError: the folder is of another architecture.
        WeightsError: the weights do not fit config.json, or are damaged.
        CheckpointError: `out` cannot be written.
    """
    refuse_full(out)
    config = GlmvConfig.from_hf(hf)
    source = SafetensorsFolder(hf)
    check_names_and_shapes(source, hf_shapes(config))  # before the minutes that building and reading take
    with process_group(), progress_bar("reading tensors", len(source.names())) as progress:
        model = build_whole_model(config, _Watched(source, progress), dtype=dtype_of(source))
        save_checkpoint(out, [model], hf_files=lambda folder: copy_hf_files(hf, folder))


class _Watched:
    """A source of weights that advances a progress bar."""

    def __init__(self, source: SafetensorsFolder, progress: Progress) -> None:
        self.source, self.progress = source, progress
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if stop == self.shape(name)[0]:
            self.progress.advance(self.progress.task_ids[0])
        return self.source.rows(name, start, stop)


def export_checkpoint(
    checkpoint: Path, out: Path, *, dtype: str = "keep", max_shard_bytes: int = 5 * 10**9, verify: str = "full"
) -> None:
    """Make a Hugging Face folder of a checkpoint, under a temporary name until it is complete.

    Raises:
        ConvertError: an option is unknown, or `out` is not empty or cannot be written.
        CheckpointError: `checkpoint` is no checkpoint, is damaged, or is not safe to read.
    """
    check_options(dtype, verify)
    refuse_full(out)
    path = find_checkpoint(checkpoint)
    config = GlmvConfig.from_hf(path / HF_FILES)
    stored = stored_dtype(path / STATE)
    wanted = DTYPES.get(dtype, stored)
    with process_group():
        model = build_whole_model(config, dtype=stored)
        load_checkpoint(path, [model], verify=verify)
        write_hf_folder(model, path / HF_FILES, out, wanted, max_shard_bytes)


# --- comparison -------------------------------------------------------------------------------------------------------


def compare_folders(dir_a: Path, dir_b: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the differences of two Hugging Face folders: what differs, and what it is in each of them.

    Tensors are compared bit by bit, in whatever files they are. JSON is compared by content, without the version of
    transformers that wrote it and with both spellings of rotary embedding taken as equal; other files byte by byte.

    Raises:
        ConvertError: a folder is a checkpoint, or a file is not JSON.
        WeightsError: a folder has no readable weights.
    """
    for folder in (dir_a, dir_b):
        if is_checkpoint(folder):
            raise ConvertError(f"{folder} is a checkpoint: export it first; verify compares Hugging Face folders")
    a, b = SafetensorsFolder(dir_a), SafetensorsFolder(dir_b)
    names = sorted({*a.names(), *b.names()})
    with progress_bar("comparing tensors", len(names)) as progress:
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
    x, y = a.unchecked_tensor(name), b.unchecked_tensor(name)
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
        flat_a, flat_b = (dict(_flatten(_read_json(path))) for path in (a, b))
        for key in sorted({*flat_a, *flat_b} - {"transformers_version"}):
            if flat_a.get(key) != flat_b.get(key):
                yield f"{name}: {key}", str(flat_a.get(key, "absent")), str(flat_b.get(key, "absent"))
    elif a.read_bytes() != b.read_bytes():
        yield name, "bytes differ", "bytes differ"


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvertError(f"{path} is not valid JSON: {error}") from None
    return with_one_rope_spelling(content) if path.name == CONFIG_FILE else content


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys of nested objects with their values as JSON, so that 1, true and "1" differ."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, json.dumps(content, sort_keys=True)
