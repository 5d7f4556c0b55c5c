"""Marks on parameters that tell megatron-core how to reduce and count their gradients.

megatron-core's linear layers set some of them. This module sets what the layers cannot know: where in the model they
are, and how the model is laid out.

    tensor_model_parallel                 the gradient counts in the gradient norm on every tensor rank, otherwise only
                                          on tensor rank 0
    allreduce = False                     an expert: the gradient is reduced over the ranks that hold the same experts
    average_gradients_across_tp_domain    the gradient is averaged over tensor ranks
"""

from __future__ import annotations

from typing import Any

from torch import nn

VISION_PARTS = ("vision_model.", "adapter.")


def mark_parameters(model: nn.Module, vision_sharding: str) -> None:
    """Mark the parameters of a GlmvModel, with any backend.

    Args:
        model: One chunk of the model, before DDP wraps it.
        vision_sharding: `ParallelConfig.vision`.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(VISION_PARTS):
            _mark_vision(parameter, vision_sharding)
        if ".experts." in name:
            _mark_expert(name, parameter)


def _mark_vision(parameter: Any, vision_sharding: str) -> None:
    if vision_sharding == "images":
        parameter.tensor_model_parallel = False  # whole on every tensor rank: count it once
    if not getattr(parameter, "tensor_model_parallel", False):
        # Each tensor rank has the gradient of its own images. Or all have the same gradient but for the noise of
        # non-deterministic kernels, and the copies must not drift apart.
        parameter.average_gradients_across_tp_domain = True


def _mark_expert(name: str, parameter: Any) -> None:
    # megatron-core itself sets this only if EP > 1. With TP alone the gradients would be wrong without an error. And
    # the optimizer state on disk has the same format at every layout only if experts always have their own optimizer.
    parameter.allreduce = False
    # The distributed optimizer splits an expert's gradient over all ranks that hold the expert, tensor ranks among
    # them; with expert tensor parallelism tensor ranks hold different parts of it. Either way each tensor rank counts
    # its own share. Transformer Engine sets this mark up to version 2.12 only.
    parameter.tensor_model_parallel = True
    if not hasattr(parameter, "partition_dim"):  # what belongs to that mark; megatron-core 0.17 sets it itself
        parameter.partition_dim, parameter.partition_stride = int(".linear_fc2." in name), 1
