"""Write a checkpoint of adapters, as a LoRA run saves it. Runs in processes of its own, in any layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import TrainState, save_checkpoint
from model.config import GlmvConfig
from model.glmv import build_model_chunks
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.lora_weights import fill_adapters, peft_shapes
from model.process_groups import initialize_model_parallel
from model.weights.random_weights import generator_of
from tests.model.layout_cases import layout_of
from tests.peft_reference import Tensors
from training.lora_base import base_fingerprint
from training.start_point import find_weights

SEED = 5


def save(
    hf_files: str,
    init_from: str,
    checkpoint: str,
    lora: dict[str, Any],
    adapters: str = "",
    layout: str = "",
    dtype: torch.dtype = torch.float32,
    said: dict[str, Any] | None = None,
) -> None:
    """Save adapters.

    Args:
        hf_files: Folder of the model's config.json.
        init_from: The base model.
        checkpoint: Step folder to make.
        lora: Keys of LoraConfig.
        adapters: File of their tensors by PEFT's names; empty: random ones, B included.
        layout: Parallel sizes.
        dtype: Dtype of the adapters.
        said: Keys of LoraConfig as the run says they were, if they were others.
    """
    config, wanted = GlmvConfig.from_hf(Path(hf_files)), LoraConfig(**lora)
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_model_chunks(config, parallel, pipeline_layout=stages, dtype=dtype)
    for chunk in chunks:
        add_adapters(chunk, wanted)
    tensors = torch.load(adapters, weights_only=True) if adapters else random_factors(config, wanted)
    fill_adapters(chunks, Tensors(tensors))

    def copy_files(folder: Path) -> None:
        for path in Path(hf_files).glob("*.json"):
            if "index" not in path.name:
                shutil.copy(path, folder)

    run = {"lora": {**vars(wanted), **(said or {})}, "model": {"init_from": init_from}, "train": {"seed": SEED}}
    base = base_fingerprint(find_weights(init_from), SEED)
    save_checkpoint(
        Path(checkpoint), chunks, hf_files=copy_files, train_state=TrainState(step=3, config=run, base=base)
    )


def random_factors(config: GlmvConfig, lora: LoraConfig) -> dict[str, torch.Tensor]:
    """Return random factors by PEFT's names."""
    return {
        name: torch.empty(shape).normal_(0, 0.05, generator=generator_of(1, name))
        for name, shape in peft_shapes(config, lora).items()
    }
