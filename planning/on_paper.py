"""One rank of a layout, without other ranks, a GPU or memory.

The process group is torch's fake one, which completes every collective at once. The device is torch's "meta": its
tensors have shapes and dtypes, but no values. Everything that the program keeps in main memory is real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import unwrap
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

import model.attention
import model.cpu
from model.megatron_versions import recorded_losses
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel

DEVICE = torch.device("meta")


@contextmanager
def on_paper(parallel: ParallelConfig, rank: int, processes: int) -> Iterator[None]:
    """Be `rank` of a layout: inside, megatron-core's groups exist, and the current device holds no values.

    Args:
        parallel: The layout.
        rank: Number of the rank.
        processes: Number of all ranks.
    """
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=processes)
    tensor: Any = torch.Tensor
    true_new_group, true_type = dist.new_group, tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = true_type(self, *args, **kwargs)
        return named if args or kwargs else f"torch.cuda.{named.rpartition('.')[2]}"

    def new_group(*args: Any, **kwargs: Any) -> dist.ProcessGroup:
        return true_new_group(*args, **{**kwargs, "backend": None})  # the groups for main memory are fake, too

    try:
        with (
            mock.patch.object(dist, "new_group", new_group),
            # Sends are complete at once: model.cpu would keep their tensors for ever.
            mock.patch.object(dist, "isend", unwrap(dist.isend)),
            mock.patch.object(dist.distributed_c10d, "isend", unwrap(dist.isend)),
            mock.patch.object(model.cpu, "CPU", DEVICE),
            mock.patch.object(F, "scaled_dot_product_attention", _flash_attention),
            mock.patch.object(model.attention, "causal_lower_right", _causal_lower_right),
            mock.patch.object(tensor, "type", type_as_on_cuda),
            mock.patch.object(tensor, "cuda", lambda self, *_, **__: self.to(DEVICE)),
            # What megatron-core keeps from step to step, in modules and classes.
            mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
            mock.patch.dict(recorded_losses(), clear=True),
            # The states of random generators are real and nothing is initialised.
            mock.patch.object(CudaRNGStatesTracker, "fork", return_value=nullcontext()),
        ):
            initialize_model_parallel(parallel, seed=1)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _causal_lower_right(*size: int) -> CausalBias:
    """Make a mask, which as a subclass of Tensor cannot come from an operation that is traced. It has no values."""
    with _disable_current_modes():
        return causal_lower_right(*size)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: CausalBias | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with the kernel that torch takes for values; without them it takes the one that keeps all scores."""
    mask = None
    if attn_mask is not None and query.size(2) == key.size(2):
        is_causal = True
    elif attn_mask is not None:
        visible = attn_mask._materialize(query.device)
        mask = torch.where(visible, query.new_zeros(()), query.new_zeros(()))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
