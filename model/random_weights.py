"""Random initialisation as a source of weights: the same numbers at every layout.

A tensor is a function of the seed and its Hugging Face name, so a model started on one process and one started on a
thousand ranks are the same model.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from model.config import GlmvConfig
from model.weight_table import hf_shapes


class RandomWeights:
    """Fresh weights under Hugging Face names, in float32.

    Matrices, convolutions and tables are normal(0, initializer_range); the weights of norms are 1; biases, the
    routers' among them, are 0 (as transformers' `_init_weights`).
    """

    def __init__(self, config: GlmvConfig, seed: int) -> None:
        self.seed = seed
        self.std = config.decoder.initializer_range
        self._shapes = hf_shapes(config)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """Draw one tensor; asking again gives the same one."""
        shape = self._shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).normal_(0.0, self.std, generator=generator)
