"""RMSNorm of the torch backend, in Hugging Face's order of operations and aware of sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm: variance in float32, cast back, then scale (transformers' `Glm4vRMSNorm`).

    Takes what megatron-core's specs hand to a norm. `weight` is marked `sequence_parallel`, so that its gradient, of
    which each tensor-parallel rank has the part of its own tokens, is summed over them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)
