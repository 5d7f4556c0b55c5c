"""`pretrain.train` on a machine that makes one gradient NaN as soon as the file $GLMV_SOAK_POISON exists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import training.setup
from model.glmv import GlmvModel, build_model_chunks
from training.config import RunConfig
from training.launch import main

POISON = "GLMV_SOAK_POISON"


def poisoned(gradient: Tensor) -> Tensor:
    try:
        Path(os.environ[POISON]).unlink()
    except FileNotFoundError:
        return gradient
    return torch.full_like(gradient, float("nan"))


def build_poisoned_model(*args: Any, **options: Any) -> list[GlmvModel]:
    chunks = build_model_chunks(*args, **options)
    chunks[0].adapter.get_parameter("proj.weight").register_hook(poisoned)
    return chunks


if __name__ == "__main__":
    training.setup.build_model_chunks = build_poisoned_model
    main(RunConfig, __doc__)
