"""What a checkpoint's weights are, read from its metadata without loading them."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from model.checkpoint import STATE, CheckpointError, refuse_foreign_classes


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """The dtype of the parameters, float32 or bfloat16.

    Raises:
        CheckpointError: it holds another model, or is not safe to read.
    """
    refuse_foreign_classes(checkpoint / STATE)
    tensors = dist_checkpointing.load_tensors_metadata(str(checkpoint / STATE))
    weight = tensors.get("language_model.embedding.word_embeddings.weight")
    if weight is None or weight.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"{checkpoint} does not hold the weights of a GLM-V model")
    return weight.dtype
