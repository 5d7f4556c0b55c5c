"""Between Hugging Face folders and checkpoints: import and export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import write_json
from model.checkpoint import HF_FILES, STATE, complete_config, find_checkpoint
from model.checkpoint_manifest import MANIFEST, TENSORS, check_alone, check_files_alone, manifest_entries
from model.checkpoint_metadata import stored_dtype
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError, ConversionError, WeightsError
from model.hf_config import CONFIG_FILE
from model.hf_file_names import CHECKSUMS
from model.weights.folder import SafetensorsFolder
from model.weights.formats.block_fp8 import BLOCK, BlockQuantised, converted_names, plain_blocks, quantization_config
from model.weights.formats.opened import open_folder
from model.weights.remote import has_file, open_file, remote_of, title
from model.weights.source import WeightSource, rows_of, some
from model.weights.table import hf_shapes
from streaming.checkpoint_job import CheckpointJob
from streaming.checkpoint_weights import CheckpointWeights
from streaming.checksums import NOT_WHAT_WAS_WRITTEN, Checksums, check_algorithm
from streaming.compared import Compared
from streaming.frames import FRAME, check_frame
from streaming.hf_job import HfJob, header_checksum
from streaming.limits import SMALLEST_BLOCK, plan_limits
from streaming.run import convert
from tools.hf_output import (
    DTYPES,
    KEPT_IN_FLOAT32,
    ConvertError,
    check_options,
    copy_hf_files,
    dtype_of,
    refuse_full,
)
from training.hf_files import config_json
from training.lora_base import refuse_adapters

CONVERSION_ERRORS = (CheckpointError, ConfigError, ConversionError, ConvertError, WeightsError)  # that a user can fix

CHECK_BYTES = 2**24  # of rows in memory at a time
CHANGED = f"copy the folder again, or remove {CHECKSUMS} if the weights were changed on purpose"


@dataclass(frozen=True)
class ConversionOptions:
    """How a conversion is carried out; nothing of it changes a bit of the weights."""

    max_memory: str = ""  # of all processes together; empty: about half a GiB each
    processes: int = 0  # that convert; 0: one per core, as far as the memory allows
    checksum: str = "xxh3"  # of each tensor: xxh3 or sha256


DEFAULTS = ConversionOptions()


def import_folder(hf: Path, out: Path, options: ConversionOptions = DEFAULTS) -> tuple[str, ...]:
    """Make a checkpoint of a Hugging Face folder.

    Weights are kept in bfloat16 if all of the folder's are, else in float32. Of the local copy of a folder behind a URL
    (`model.weights.remote`), they are read from the URL.

    Returns:
        A line for each format that was recognised, besides plain tensors.

    Raises:
        ConvertError: `out` is not empty.
        ConfigError: the folder is of another architecture, or an option cannot work.
        WeightsError: the weights do not fit config.json, or are damaged.
        ConversionError: `out` cannot be written, or a process was killed.
    """
    refuse_full(out)
    check_algorithm(options.checksum)
    limits = plan_limits(options.max_memory, options.processes)
    config = GlmvConfig.from_hf(hf)
    source, read_as, expected = open_hf(hf)

    def hf_files(folder: Path) -> None:
        copy_hf_files(hf, folder)
        complete_config(folder / CONFIG_FILE)

    job = CheckpointJob(
        source,
        config,
        dtype=dtype_of(source),
        block_bytes=limits.block_bytes,
        checksum=options.checksum,
        identity={"import": identity_of(hf)},
        hf_files=hf_files,
        expected=expected,
    )
    convert(job, out, limits, "importing")
    return read_as


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str = "keep",
    max_shard_bytes: int = 5 * 10**9,
    verify: str = "full",
    fp8: bool = False,
    options: ConversionOptions = DEFAULTS,
) -> None:
    """Make a Hugging Face folder of a checkpoint, under a temporary name until it is complete.

    Raises:
        ConvertError: an option is unknown, `out` is not empty, or `fp8` has nothing to convert.
        ConfigError: an option cannot work.
        CheckpointError: `checkpoint` is no checkpoint, is damaged, or is not safe to read.
        ConversionError: `out` cannot be written, a process was killed, or a tensor is damaged.
    """
    check_options(dtype, verify)
    check_algorithm(options.checksum)
    refuse_full(out)
    path = find_checkpoint(checkpoint)
    refuse_adapters(path)
    check_alone(path, verify, only_small=False)
    config = GlmvConfig.from_hf(path / HF_FILES)
    shapes, converted = hf_shapes(config), fp8_names(config) if fp8 else []
    fewest_rows = BLOCK * 4 * max((shapes[name][1] for name in converted), default=0)
    limits = plan_limits(options.max_memory, options.processes, max(SMALLEST_BLOCK, fewest_rows))
    wanted = DTYPES.get(dtype, stored_dtype(path / STATE))
    weights, expected = open_checkpoint(path, config, verify)
    quantised = BlockQuantised(Compared(weights, expected), converted)

    def hf_files(folder: Path) -> None:
        copy_hf_files(path / HF_FILES, folder)
        content = config_json(path / HF_FILES, config, wanted)
        if fp8:
            content["quantization_config"] = quantization_config(shapes)
        write_json(folder / CONFIG_FILE, content)

    def written_dtype(name: str) -> torch.dtype:
        if name in quantised.made:
            return quantised.dtype(name)
        return torch.float32 if name.endswith(KEPT_IN_FLOAT32) else wanted

    job = HfJob(
        quantised if fp8 else weights,
        dtype_of=written_dtype,
        max_shard_bytes=max_shard_bytes,
        block_bytes=limits.block_bytes,
        checksum=options.checksum,
        identity={"export": identity_of(path)},
        hf_files=hf_files,
        expected={} if fp8 else expected,
        row_multiple=BLOCK if fp8 else 1,
    )
    convert(job, out, limits, "exporting")


def fp8_names(config: GlmvConfig) -> list[str]:
    """Return the names of the tensors that an export in FP8 converts.

    Raises:
        ConvertError: there are none.
    """
    converted = converted_names(hf_shapes(config))
    if not converted:
        raise ConvertError(
            f"--fp8 would convert nothing: every attention and MLP of this decoder has a size that is no multiple of "
            f"{BLOCK}; remove --fp8"
        )
    return converted


def fp8_line(out: Path) -> str:
    """Return what is FP8 in an export."""
    shapes = hf_shapes(GlmvConfig.from_hf(out))
    line = f"FP8: {len(converted_names(shapes)):,} of {len(shapes):,} tensors, in blocks of {BLOCK}x{BLOCK}"
    if plain := plain_blocks(shapes):
        line += f"; plain, because a size is no multiple of {BLOCK}: {some(plain)}"
    return line


def open_hf(hf: Path) -> tuple[WeightSource, tuple[str, ...], dict[str, Any]]:
    """Open the weights of a Hugging Face folder.

    Returns:
        The weights, a line for each format that was recognised besides plain tensors, and the checksums of tensors, to
        be compared while they are read.

    Raises:
        ConvertError, WeightsError: They cannot be read, or are damaged.
    """
    source, read_as = open_folder(hf, once=True)
    expected = exported_checksums(hf)
    if expected and read_as:  # the tensors that are read are not those of the file
        check_stored(hf, expected)
        expected = {}
    return source, read_as, expected


def open_checkpoint(path: Path, config: GlmvConfig, verify: str) -> tuple[CheckpointWeights, dict[str, Any]]:
    """Open the weights of a checkpoint of which `check_alone` has found nothing.

    Returns:
        The weights, and the checksums of tensors, to be compared while they are read.

    Raises:
        CheckpointError: It is damaged, of another model, or not safe to read.
    """
    framed, expected = check_other_files(path) if verify == "full" else ({}, {})
    weights = CheckpointWeights(path, config)
    for file, frame in framed.items():
        check_frame(path, file, frame, weights.archives[file])
    return weights, expected


def check_other_files(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Compare the files of a checkpoint with its manifest, except those whose tensors have checksums.

    Returns:
        What surrounds the tensors in each of these files, and the checksums of the tensors: to be compared when the
        tensors have been found, and while they are read.

    Raises:
        CheckpointError: A file is damaged.
    """
    files, tensors = manifest_entries(path)
    if tensors and set(tensors) != set(hf_shapes(GlmvConfig.from_hf(path / HF_FILES))):
        raise CheckpointError(f"{path / MANIFEST} has checksums of other tensors: copy or make the checkpoint again")
    framed = {name: entry[FRAME] for name, entry in files.items() if tensors and FRAME in entry}
    if files:  # an earlier version wrote no manifest
        check_files_alone(path, [name for name in files if name.startswith(TENSORS) and name not in framed])
    return {name.removeprefix(TENSORS): frame for name, frame in framed.items()}, tensors


def exported_checksums(hf: Path) -> dict[str, Any]:
    """Return the checksums of a folder that this program wrote; nothing for another's.

    Raises:
        ConvertError: the file is damaged.
    """
    file = hf / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
        headers, tensors = content["headers"], content["tensors"]
        if not all(isinstance(entry, dict) for entry in (headers, tensors, *tensors.values())):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConvertError(f"{file} is damaged: export the folder again, or remove this file") from None
    if set(tensors) != set(SafetensorsFolder(hf).names()):
        raise ConvertError(f"{file} is of other tensors: {CHANGED}")
    for name, checksum in headers.items():
        if not has_file(hf, name) or header_checksum(open_file(hf, name)) != checksum:
            raise ConvertError(f"{title(hf)}/{name} is not the file that {CHECKSUMS} describes: {CHANGED}")
    return tensors


def check_stored(hf: Path, expected: Mapping[str, Any]) -> None:
    """Compare the tensors of a folder with their checksums, in this process.

    Raises:
        WeightsError: One is damaged.
    """
    folder = SafetensorsFolder(hf, once=True)
    for name in folder.names():
        shape, dtype = folder.shape(name), folder.dtype(name)
        checksums = Checksums("xxh3", expected[name])
        step = rows_of(CHECK_BYTES, shape, dtype)
        for start in range(0, shape[0], step):
            rows = folder.unchecked_rows(name, start, min(start + step, shape[0]))
            checksums.update(rows, rows)
        if checksums.is_damaged(dtype, shape):
            raise WeightsError(f"{folder.where(name)} is damaged: tensor {name} {NOT_WHAT_WAS_WRITTEN}")


def identity_of(folder: Path) -> dict[str, Any]:
    """Return what tells whether a folder is the one that a killed conversion has read."""
    if remote := remote_of(folder):  # the name of the copy stands for the versions of all files
        return {"folder": title(folder), "copy": folder.name, "files": {n: asdict(s) for n, s in remote.files.items()}}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
    return {
        "folder": str(folder.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
