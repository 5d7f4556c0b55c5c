"""The optimizer's update in two parts, with a decision between them, and what the backward pass has moved already.

megatron-core's `optimizer.step()` prepares the gradients, computes their norm, clips and updates. Here the norm is
known before anything is clipped or updated, so that a bad step can leave no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

from model.megatron_versions import gather_after_update


@torch.no_grad()
def prepare_update(optimizer: Any) -> float:
    """Take over the gradients of a step and return their norm, before clipping. Collective.

    Args:
        optimizer: megatron-core's ChainedOptimizer, without a loss scaler.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_update(optimizer: Any, grad_norm: float) -> None:
    """Clip the prepared gradients and update the weights. The same as the rest of `optimizer.step()`. Collective.

    Args:
        optimizer: as for `prepare_update`.
        grad_norm: what that returned on this process.
    """
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer and part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    last = optimizer.chained_optimizers[-1]
    for part in optimizer.chained_optimizers:
        # Without overlap each part would gather the weights of all parts: of dense layers and of experts.
        gather_after_update(part, part is last)
        part.step_with_ready_grads()


def expert_biases(model_chunks: Sequence[nn.Module]) -> list[Tensor]:
    """Return the expert biases of this rank. The end of every backward pass moves them."""
    return [buffer for chunk in model_chunks for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]


class KeptExpertBiases:
    """Copies of the expert biases from before a step.

    Args:
        model_chunks: what this rank holds of the model.
    """

    def __init__(self, model_chunks: Sequence[nn.Module]) -> None:
        self._biases = expert_biases(model_chunks)
        self._values = [bias.clone() for bias in self._biases]

    def restore(self) -> None:
        """Put the biases back to what they were."""
        for bias, value in zip(self._biases, self._values, strict=True):
            bias.copy_(value)
