"""Which model the adapters of a LoRA run belong to, and what a run with adapters may not do.

A checkpoint of such a run holds adapters and their optimizer state. The frozen weights are read again from
`model.init_from`, which must still be the same model: its fingerprint is kept in the checkpoint's train_state.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash

from common.urls import shown
from model.checkpoint import STATE, TRAIN_STATE, TrainState, is_checkpoint, read_train_state
from model.checkpoint_manifest import MANIFEST, parse_manifest
from model.config import ConfigError, GlmvConfig
from model.lora_targets import adapted_parts, selected_sites
from model.weights.folder import SafetensorsFolder
from model.weights.remote import kept_text
from model.weights.source import rows_of
from training.config import RunConfig

FINGERPRINT = "fingerprint_1"  # kept in the local copy of a folder behind a URL; another number if it is made otherwise
SAMPLE = 1024  # values of each tensor that the fingerprint of a Hugging Face folder reads; rows count whole


def base_fingerprint(weights: Path | None, seed: int) -> str:
    """Return what tells the weights of one model from those of another, without reading them all.

    Args:
        weights: A checkpoint, whose manifest has checksums, or a Hugging Face folder, of which the first values of
            every tensor are read. None for random weights.
        seed: Seed of random weights.

    Raises:
        CheckpointError: The manifest of the checkpoint is damaged.
        WeightsError: The folder has no readable weights.
    """
    if weights is None:
        return f"random weights of seed {seed}"
    if is_checkpoint(weights):
        digest = xxhash.xxh3_64(json.dumps(_checksums(weights), sort_keys=True).encode())
        return f"checkpoint {digest.hexdigest()}"
    return kept_text(weights, FINGERPRINT, lambda: _sampled(SafetensorsFolder(weights)))


def _sampled(folder: SafetensorsFolder) -> str:
    """Return a fingerprint of the first values of every tensor."""
    digest = xxhash.xxh3_64()
    for name in sorted(folder.names()):
        shape, dtype = folder.shape(name), folder.dtype(name)
        digest.update(f"{name} {dtype} {shape} ".encode())
        count = min((*shape, 1)[0], rows_of(SAMPLE * dtype.itemsize, shape, dtype))
        sample = folder.unchecked_rows(name, 0, count) if shape else folder.unchecked_tensor(name).reshape(1)
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return f"Hugging Face weights {digest.hexdigest()}"


def _checksums(checkpoint: Path) -> dict[str, Any]:
    """Return the checksums of a checkpoint's weights; only sizes where an earlier version wrote no manifest."""
    manifest = checkpoint / MANIFEST
    if manifest.is_file():
        files = parse_manifest(manifest)
        return {name: entry for name, entry in files.items() if name.startswith(f"{STATE}/")}
    return {path.name: path.stat().st_size for path in (checkpoint / STATE).iterdir()}


def refuse_adapters(init_from: Path) -> None:
    """Refuse a checkpoint of adapters as the weights to start from.

    Raises:
        ConfigError: It is one.
    """
    if (init_from / TRAIN_STATE).is_file() and read_train_state(init_from).base:
        raise ConfigError(
            f"model.init_from={init_from} holds only the adapters of a LoRA run: make a whole model of it with "
            f"`python -m tools.convert merge --checkpoint {init_from} --out DIR`, and start from DIR"
        )


def check_same_adapters(before: TrainState, config: RunConfig, folder: Path) -> None:
    """Check that a run has the adapters that its checkpoint was saved with.

    Raises:
        ConfigError: It has not.
    """
    default = type(config)().lora
    old: dict[str, Any] = {**vars(default), **before.config.get("lora", {})}
    for key in ("rank", "targets"):
        was, now = old[key], getattr(config.lora, key)
        same = set(was) == set(now) if key == "targets" and config.lora.rank else was == now
        if not same and (old["rank"] or config.lora.rank):
            raise ConfigError(
                f"lora.{key} was {was} in the run at {folder} and is {now} now, which are other adapters; put it back, "
                "or choose another train.output_dir"
            )


def check_same_base(before: TrainState, config: RunConfig, fingerprint: str, folder: Path) -> None:
    """Check that the frozen weights are those that the adapters of a checkpoint were trained on.

    Raises:
        ConfigError: They are not.
    """
    if fingerprint != before.base:
        was = shown(before.config.get("model", {}).get("init_from", ""))
        raise ConfigError(
            f"model.init_from={shown(config.model.init_from)} is another base model than the one that the adapters in "
            f"{folder} were trained on ({was}): found {fingerprint}, not "
            f"{before.base}; name that model, or choose another train.output_dir"
        )


def check_lora(config: RunConfig, model: GlmvConfig) -> None:
    """Check `lora` against the model and the other keys.

    Raises:
        ConfigError: A target matches nothing, or is in a frozen part, or the layout or dropout is not supported.
    """
    if not config.lora.rank:
        return
    parts = adapted_parts(model, config.lora)
    if frozen := [part for part in config.freeze if part in parts]:
        raise ConfigError(
            f"freeze={config.freeze} and lora.targets={config.lora.targets} contradict each other: the targets name "
            f"matrices of {frozen[0]}; remove it from freeze (LoRA freezes all weights but the adapters), or name "
            "other targets"
        )
    adapts_experts = any(site.expert is not None for site in selected_sites(model, config.lora.targets))
    if adapts_experts and config.parallel.expert_tensor_parallel_size > 1:
        raise ConfigError(
            "lora.targets names routed experts, whose adapters are not split over tensor ranks: set "
            "parallel.expert_tensor_parallel_size=1"
        )
    if adapts_experts and config.lora.dropout:
        raise ConfigError(
            f"lora.dropout={config.lora.dropout} and lora.targets={config.lora.targets}: PEFT has no dropout for "
            "adapters of routed experts; set lora.dropout=0, or name no experts in lora.targets"
        )
