"""Adapters of a LoRA run for others: as PEFT's files, or merged into the weights of their base model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.files import write_json
from common.urls import shown
from model.checkpoint import HF_FILES, STATE, find_checkpoint, is_checkpoint, read_train_state
from model.checkpoint_manifest import TENSORS, check_alone, check_files_alone, manifest_entries
from model.checkpoint_metadata import check_metadata, stored_dtype
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError
from model.hf_config import CONFIG_FILE
from model.lora_config import LoraConfig
from model.lora_targets import Site, selected_sites
from model.weights.formats.opened import open_folder
from model.weights.random_weights import RandomWeights
from model.weights.remote import title
from model.weights.source import WeightSource
from model.weights.table import hf_shapes
from streaming.adapter_weights import TILE, MergedWeights, PeftWeights, StoredAdapters, largest_tile
from streaming.checksums import check_algorithm
from streaming.compared import Compared
from streaming.hf_job import HfJob
from streaming.limits import SMALLEST_BLOCK, plan_limits
from streaming.run import convert
from tools.conversion import DEFAULTS, ConversionOptions, identity_of, open_checkpoint, open_hf
from tools.hf_output import (
    DTYPES,
    KEPT_IN_FLOAT32,
    check_options,
    copy_hf_files,
    dtype_of,
    refuse_full,
)
from training.hf_files import config_json
from training.lora_base import base_fingerprint
from training.start_point import find_weights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ_AS_EXPERTS = ("gate_proj", "up_proj", "down_proj")  # by PEFT, among target_modules of a mixture of experts


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A checkpoint of a LoRA run."""

    path: Path  # the step folder
    model: GlmvConfig
    lora: LoraConfig
    init_from: str  # where the run found its base model; empty: random weights
    seed: int  # of random weights
    base: str  # the base model's fingerprint


def read_adapter_checkpoint(checkpoint: Path) -> AdapterCheckpoint:
    """Return what a checkpoint of adapters says about itself.

    Raises:
        CheckpointError: It is no checkpoint, or holds a whole model.
    """
    path = find_checkpoint(checkpoint)
    state = read_train_state(path)
    if not state.base:
        raise CheckpointError(f"{path} holds a whole model, no adapters: use `python -m tools.convert export`")
    config: Any = state.config
    try:
        lora = LoraConfig(**config["lora"])
        init_from, seed = config["model"]["init_from"], config["train"]["seed"]
        if type(lora.rank) is not int or lora.rank == 0 or not isinstance(init_from, str):
            raise TypeError("lora.rank must be a positive number, and model.init_from a text")
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/train_state.json is damaged ({error}); use another step") from None
    return AdapterCheckpoint(path, GlmvConfig.from_hf(path / HF_FILES), lora, init_from, seed, state.base)


def open_adapters(found: AdapterCheckpoint, verify: str) -> StoredAdapters:
    """Open the adapters of a checkpoint, after comparing its files with its manifest.

    Raises:
        CheckpointError: It is damaged, holds other adapters than it says, or is not safe to read.
    """
    check_alone(found.path, verify, only_small=False)
    files, _ = manifest_entries(found.path)
    if verify == "full" and files:  # an earlier version wrote no manifest
        check_files_alone(found.path, [name for name in files if name.startswith(TENSORS)])
    check_metadata(found.path / STATE)
    return StoredAdapters(found.path, found.model, found.lora)


# --- PEFT's files -----------------------------------------------------------------------------------------------------


def export_lora(checkpoint: Path, out: Path, *, verify: str = "full", options: ConversionOptions = DEFAULTS) -> None:
    """Make a folder that `peft.PeftModel.from_pretrained` loads. The base model is not read.

    Raises:
        ConvertError: an option is unknown, or `out` is not empty.
        ConfigError: an option cannot work.
        CheckpointError: `checkpoint` holds no adapters, is damaged, or is not safe to read.
        ConversionError: `out` cannot be written, or a process was killed.
    """
    check_options("keep", verify)
    check_algorithm(options.checksum)
    refuse_full(out)
    found = read_adapter_checkpoint(checkpoint)
    limits = plan_limits(options.max_memory, options.processes)
    source = PeftWeights(open_adapters(found, verify))
    job = HfJob(
        source,
        dtype_of=source.dtype,
        max_shard_bytes=sys.maxsize,  # PEFT reads one file
        block_bytes=limits.block_bytes,
        checksum=options.checksum,
        identity={"export-lora": identity_of(found.path)},
        hf_files=lambda folder: write_json(folder / ADAPTER_CONFIG, adapter_config(found)),
        single=ADAPTER_WEIGHTS,
    )
    convert(job, out, limits, "exporting adapters")


def adapter_config(found: AdapterCheckpoint) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter, with every adapted module by its whole name.

    PEFT refuses dropout beside `target_parameters`, so there it is 0. It has no effect where PEFT applies the adapter.
    """
    modules, parameters = peft_targets(found.model, selected_sites(found.model, found.lora.targets))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": shown(found.init_from) or None,
        "inference_mode": True,
        "r": found.lora.rank,
        "lora_alpha": found.lora.alpha,
        "lora_dropout": 0.0 if parameters else found.lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def peft_targets(config: GlmvConfig, chosen: Sequence[Site]) -> tuple[list[str], list[str]]:
    """Return PEFT's target_modules and target_parameters.

    For a mixture of experts, PEFT takes a module called gate_proj, up_proj or down_proj for the routed experts of older
    versions of transformers. The other MLPs are therefore named by their parameters, which have the same tensors.
    """
    modules, parameters = [], []
    for module, site in {site.module: site for site in chosen}.items():
        if site.expert is not None:
            parameters.append(module)
        elif config.decoder.is_moe and site.leaf in READ_AS_EXPERTS:
            parameters.append(f"{module}.weight")
        else:
            modules.append(module)
    return modules, parameters


# --- merging ----------------------------------------------------------------------------------------------------------


class BaseModel(NamedTuple):
    """The base model of adapters."""

    source: WeightSource
    dtype: torch.dtype  # of its parameters but the expert biases
    identity: Any  # see identity_of

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return torch.float32 if name.endswith(KEPT_IN_FLOAT32) else self.dtype


def merge(
    checkpoint: Path,
    out: Path,
    *,
    base: str = "",
    dtype: str = "keep",
    max_shard_bytes: int = 5 * 10**9,
    verify: str = "full",
    options: ConversionOptions = DEFAULTS,
) -> None:
    """Make a Hugging Face folder of the base model with the adapters added to its weights.

    Raises:
        ConvertError: an option is unknown, or `out` is not empty.
        CheckpointError: `checkpoint` holds no adapters, or it or the base is damaged or not safe to read.
        ConfigError: the base model is not found, or is another one, or an option cannot work.
        WeightsError: the base model is damaged, or cannot be read.
        ConversionError: `out` cannot be written, or a process was killed.
    """
    check_options(dtype, verify)
    check_algorithm(options.checksum)
    refuse_full(out)
    found = read_adapter_checkpoint(checkpoint)
    weights = find_base(found, base)
    fewest = largest_tile(found.model, found.lora)
    if weights is None:  # random tensors are made whole
        fewest = max(fewest, *(4 * torch.Size(shape).numel() for shape in hf_shapes(found.model).values()))
    limits = plan_limits(options.max_memory, options.processes, max(SMALLEST_BLOCK, fewest))
    adapters = open_adapters(found, verify)
    model = open_base(found, weights, verify)
    wanted = DTYPES.get(dtype, model.dtype)

    def hf_files(folder: Path) -> None:
        copy_hf_files(found.path / HF_FILES, folder)
        write_json(folder / CONFIG_FILE, config_json(found.path / HF_FILES, found.model, wanted))

    job = HfJob(
        MergedWeights(model.source, adapters, model.dtype_of),
        dtype_of=lambda name: torch.float32 if name.endswith(KEPT_IN_FLOAT32) else wanted,
        max_shard_bytes=max_shard_bytes,
        block_bytes=limits.block_bytes,
        checksum=options.checksum,
        identity={"merge": identity_of(found.path), "base": model.identity},
        hf_files=hf_files,
        row_multiple=TILE,
    )
    convert(job, out, limits, "merging")


def find_base(found: AdapterCheckpoint, base: str) -> Path | None:
    """Return the checkpoint or Hugging Face folder of the base model; None for random weights.

    Args:
        found: The adapters.
        base: Where it is now; empty: where the run has found it.

    Raises:
        ConfigError: It is not found, or is another one than the one that the adapters were trained on.
        WeightsError: It cannot be read.
    """
    try:
        weights = find_weights(base or found.init_from)
    except ConfigError as error:
        raise ConfigError(f"the base model is not found: {error}; say with --base where it is now") from None
    if (fingerprint := base_fingerprint(weights, found.seed)) != found.base:
        name = title(weights) if weights else "random weights"
        raise ConfigError(
            f"{name} is another base model than the one that the adapters in "
            f"{found.path} were trained on: found {fingerprint}, not {found.base}; name that model with --base"
        )
    return weights


def open_base(found: AdapterCheckpoint, weights: Path | None, verify: str) -> BaseModel:
    """Open the base model, whose tensors are compared with their checksums while they are read.

    Raises:
        CheckpointError, ConvertError, WeightsError: It is damaged or not safe to read.
    """
    if weights is None:
        return BaseModel(RandomWeights(found.model, found.seed), stored_dtype(found.path / STATE), found.seed)
    if is_checkpoint(weights):
        check_alone(weights, verify, only_small=False)
        stored, expected = open_checkpoint(weights, found.model, verify)
        return BaseModel(Compared(stored, expected), stored_dtype(weights / STATE), identity_of(weights))
    if verify == "full":
        plain, _, expected = open_hf(weights)
        source: WeightSource = Compared(plain, expected)
    else:
        source = open_folder(weights, once=True).source
    return BaseModel(source, dtype_of(source), identity_of(weights))
