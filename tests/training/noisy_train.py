"""`pretrain.train` on a machine that computes one gradient slightly differently each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import training.setup
from model.glmv import GlmvModel, build_model_chunks
from training.config import RunConfig
from training.launch import main


def noisy(gradient: Tensor) -> Tensor:
    return gradient + 1e-6 * torch.rand_like(gradient)


def build_noisy_model(*args: Any, **options: Any) -> list[GlmvModel]:
    chunks = build_model_chunks(*args, **options)
    chunks[0].adapter.get_parameter("proj.weight").register_hook(noisy)
    return chunks


if __name__ == "__main__":
    training.setup.build_model_chunks = build_noisy_model
    main(RunConfig, __doc__)
