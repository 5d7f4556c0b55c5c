"""Cases of tests/model/test_checkpoint_layouts.py that run in processes of their own."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from model.checkpoint import load_checkpoint, save_checkpoint
from model.errors import CheckpointError
from model.glmv import GlmvModel, build_model_chunks
from model.process_groups import initialize_model_parallel
from model.weights.load import RandomWeights, load_weights
from tests.model.layout_cases import layout_of
from tests.reference import small_config


def build(variant: str, layout: str) -> list[GlmvModel]:
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    return build_model_chunks(small_config(variant), parallel, pipeline_layout=stages)


def save(variant: str, layout: str, checkpoint: str) -> None:
    """Save random weights."""
    chunks = build(variant, layout)
    load_weights(chunks, RandomWeights(small_config(variant), seed=1))
    save_checkpoint(Path(checkpoint), chunks, hf_files=lambda _: None)


def load_error(variant: str, layout: str, checkpoint: str) -> str:
    """Load a checkpoint and return the error, or an empty string."""
    try:
        load_checkpoint(Path(checkpoint), build(variant, layout))
    except CheckpointError as error:
        return str(error)
    return ""


def save_error(variant: str, layout: str, checkpoint: str, max_file_bytes: int) -> str:
    """Save where no file may be larger than `max_file_bytes`, and return the error, or an empty string."""
    chunks = build(variant, layout)
    load_weights(chunks, RandomWeights(small_config(variant), seed=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, before[1]))
    try:
        save_checkpoint(Path(checkpoint), chunks, hf_files=lambda _: None)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def fill_adapter_with_nan_and_save(variant: str, layout: str, checkpoint: str) -> None:
    """Save random weights with a NaN in the first stage."""
    chunks = build(variant, layout)
    load_weights(chunks, RandomWeights(small_config(variant), seed=1))
    with torch.no_grad():
        for chunk in chunks:
            if hasattr(chunk, "adapter"):
                chunk.adapter.proj.weight[0, 0] = torch.nan
    save_checkpoint(Path(checkpoint), chunks, hf_files=lambda _: None)
