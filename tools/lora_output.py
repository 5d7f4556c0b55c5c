"""Adapters of a LoRA run for others: as PEFT's files, or merged into the weights of their base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.files import write_json
from common.urls import shown
from model.checkpoint import HF_FILES, STATE, find_checkpoint, load_checkpoint, read_train_state
from model.checkpoint_metadata import stored_dtype
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError
from model.glmv import GlmvModel
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.lora_targets import Site, selected_sites
from model.lora_weights import export_adapters, merge_adapters
from model.weights.formats.opened import open_folder
from model.weights.remote import title
from model.whole_model import build_whole_model
from tools.hf_output import DTYPES, check_options, complete_or_removed, dtype_of, refuse_full, write_hf_folder
from training.distributed import process_group
from training.lora_base import base_fingerprint
from training.setup import fill_weights
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
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/train_state.json is damaged ({error}); use another step") from None
    return AdapterCheckpoint(path, GlmvConfig.from_hf(path / HF_FILES), lora, init_from, seed, state.base)


# --- PEFT's files -----------------------------------------------------------------------------------------------------


def export_lora(checkpoint: Path, out: Path, *, verify: str = "full") -> None:
    """Make a folder that `peft.PeftModel.from_pretrained` loads. The base model is not read.

    Raises:
        ConvertError: an option is unknown, or `out` is not empty or cannot be written.
        CheckpointError: `checkpoint` holds no adapters, is damaged, or is not safe to read.
    """
    check_options("keep", verify)
    refuse_full(out)
    found = read_adapter_checkpoint(checkpoint)
    with process_group():
        model = build_whole_model(found.model, dtype=stored_dtype(found.path / STATE))
        add_adapters(model, found.lora)
        load_checkpoint(found.path, [model], verify=verify)
        tensors: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in export_adapters(model)}
    with complete_or_removed(out) as folder:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, adapter_config(found))


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


def merge(
    checkpoint: Path,
    out: Path,
    *,
    base: str = "",
    dtype: str = "keep",
    max_shard_bytes: int = 5 * 10**9,
    verify: str = "full",
) -> None:
    """Make a Hugging Face folder of the base model with the adapters added to its weights.

    Raises:
        ConvertError: an option is unknown, or `out` is not empty or cannot be written.
        CheckpointError: `checkpoint` holds no adapters, or it or the base is damaged or not safe to read.
        ConfigError: the base model is not found, or is another one.
    """
    check_options(dtype, verify)
    refuse_full(out)
    found = read_adapter_checkpoint(checkpoint)
    try:
        weights = find_weights(base or found.init_from)
    except ConfigError as error:
        raise ConfigError(f"the base model is not found: {error}; say with --base where it is now") from None
    if (fingerprint := base_fingerprint(weights, found.seed)) != found.base:
        base = title(weights) if weights else "random weights"
        raise ConfigError(
            f"{base} is another base model than the one that the adapters in "
            f"{found.path} were trained on: found {fingerprint}, not {found.base}; name that model with --base"
        )
    adapter_dtype = stored_dtype(found.path / STATE)
    base_dtype = _dtype_of_base(weights, adapter_dtype)
    with process_group():
        model = build_whole_model(found.model, dtype=base_dtype)
        fill_weights([model], weights, found.seed, verify)
        merge_checkpoint(model, found, adapter_dtype, verify)
        write_hf_folder(model, found.path / HF_FILES, out, DTYPES.get(dtype, base_dtype), max_shard_bytes)


def merge_checkpoint(model: GlmvModel, found: AdapterCheckpoint, dtype: torch.dtype, verify: str) -> None:
    """Add the adapters of a checkpoint, which are of `dtype`, to the weights of a whole model."""
    add_adapters(model, found.lora, dtype)
    load_checkpoint(found.path, [model], verify=verify)
    merge_adapters(model)


def _dtype_of_base(weights: Path | None, otherwise: torch.dtype) -> torch.dtype:
    if weights is None:
        return otherwise
    return stored_dtype(weights / STATE) if (weights / STATE).is_dir() else dtype_of(open_folder(weights).source)
