"""Between Hugging Face folders and checkpoints: import and export."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress
from torch import Tensor

from model.checkpoint import HF_FILES, STATE, find_checkpoint, load_checkpoint, save_checkpoint
from model.checkpoint_metadata import stored_dtype
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError, WeightsError
from model.weights.formats.opened import open_folder
from model.weights.load import check_names_and_shapes, hf_shapes
from model.weights.source import WeightSource
from model.whole_model import build_whole_model
from tools.hf_output import (
    DTYPES,
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
    source, _ = open_folder(hf)
    check_names_and_shapes(source, hf_shapes(config))  # before the minutes that building and reading take
    with process_group(), progress_bar("reading tensors", len(source.names())) as progress:
        model = build_whole_model(config, _Watched(source, progress), dtype=dtype_of(source))
        save_checkpoint(out, [model], hf_files=lambda folder: copy_hf_files(hf, folder))


class _Watched:
    """A source of weights that advances a progress bar."""

    def __init__(self, source: WeightSource, progress: Progress) -> None:
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
