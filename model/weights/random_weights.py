"""Random initialisation as a source of weights, with the same values at every layout.

A tensor is a function of the seed and its Hugging Face name, so that one process and a thousand ranks start from the
same model.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from model.config import GlmvConfig
from model.weights.table import hf_shapes


class RandomWeights:
    """New weights by Hugging Face names, in float32.

    As in transformers' `_init_weights`, matrices, convolutions and tables are normal(0, initializer_range), weights of
    norms are 1, and biases are 0, those of the routers included.
    """

    def __init__(self, config: GlmvConfig, seed: int) -> None:
        self.seed = seed
        self.std = config.decoder.initializer_range
        self._shapes = hf_shapes(config)
        self._last: tuple[str, Tensor] | None = None  # tensors are made whole, and read in blocks

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor, which are the same at every call."""
        if self._last is None or self._last[0] != name:
            self._last = None  # frees its memory first
            self._last = name, self._new(name)
        return self._last[1][start:stop]

    def where(self, name: str) -> str:
        """Return where a tensor comes from."""
        return f"random weights of seed {self.seed}"

    def _new(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.empty(shape).normal_(0.0, self.std, generator=generator_of(self.seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return the random numbers of one tensor, a function of the seed and its name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
