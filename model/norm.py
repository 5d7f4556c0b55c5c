"""RMSNorm of the torch backend, in transformers' order of operations, for sequence parallelism too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm: variance in float32, cast back, then scale (transformers' `Glm4vRMSNorm`).

    The constructor takes what megatron-core's specs pass to a norm. Under sequence parallelism each tensor-parallel
    rank has the gradient of its own tokens; the mark `sequence_parallel` on `weight` makes megatron-core sum them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size]; the result has the same shape and dtype."""
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)
