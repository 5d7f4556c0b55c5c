"""Weights that are kept in FP8 (`fp8.param_gather`): where their exact values come from, and are kept.

The optimizer has float32 main weights, and after every step each rank rounds its share of them to FP8, which is then
gathered. Four things do not follow by themselves:

    filling       megatron-core takes the first main weights from a copy that Transformer Engine keeps of what the
                  parameters were built with, not from the weights that are loaded afterwards
    saving        a checkpoint holds the main weights, rounded to bf16, as it would without FP8, not the FP8 values
    resuming      FP8 values are rounded again from the main weights, not from bf16, whose scales may differ
    gathering     after a gathering that is not part of a forward pass, the transposed copies are still the old ones
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from torch import Tensor, nn


def fp8_parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that are kept in FP8."""
    return [parameter for module in modules for parameter in module.parameters() if is_float8tensor(parameter)]


# --- filling ----------------------------------------------------------------------------------------------------------


def first_values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the copies, in main memory, from which the optimizer will take its first main weights, by parameter."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "get_high_precision_init_val"):
            yield name, parameter.get_high_precision_init_val()


@torch.no_grad()
def keep_first_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace these copies by the values that the parameters have been filled with."""
    for name, copy in first_values(module):
        copy.copy_(values[name])


# --- saving and loading -----------------------------------------------------------------------------------------------


@torch.no_grad()
def with_exact_weights(state: dict[str, Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Return a sharded state in which bf16 tensors stand for the weights in FP8. Collective.

    Args:
        state: Of `model.checkpoint_state`.
        optimizer: Its main weights are taken. It may be None where no weight is in FP8.
        is_loading: Whether the tensors are to be filled, instead of written.
    """
    shards = [shard for key, part in state.items() if key.startswith("model") for shard in part.values()]
    if not any(is_float8tensor(shard.data) for shard in shards):
        return state
    exact = {} if is_loading else dict(_main_weights(optimizer))

    def exchanged(shard: Any) -> Any:
        if not is_float8tensor(shard.data):
            return shard
        data = torch.empty(shard.data.shape, dtype=shard.data.dtype) if is_loading else exact[id(shard.data)]
        return replace(shard, data=data)

    return {
        key: {name: exchanged(shard) for name, shard in part.items()} if key.startswith("model") else part
        for key, part in state.items()
    }


def _parts(optimizer: Any) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _main_weights(optimizer: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield the main weights in bf16, whole and in main memory, by the identity of their parameters. Collective."""
    for part in _parts(optimizer):
        for parameter, shard, offset in zip(*part._get_fp8_params_and_shard_fp32_from_fp8(), strict=True):
            whole = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if shard is not None:
                whole.view(-1)[offset : offset + shard.numel()] = shard.view(-1)
            dist.all_reduce(whole, group=part.data_parallel_group)  # every value is of one rank, 0 on the others
            yield id(parameter), whole.cpu()


@torch.no_grad()
def round_from_main_weights(optimizer: Any) -> None:
    """Round the weights that are kept in FP8 from the main weights, as an optimizer step does. Collective."""
    for part in _parts(optimizer):
        if parameters := fp8_parameters(part.model_chunks):
            part._copy_main_params_to_model_params()
            for chunk in part.model_chunks:
                chunk.start_param_sync(force_sync=True)
            post_all_gather_processing(parameters)


# --- gathering --------------------------------------------------------------------------------------------------------


def gather_weights(ddp: Any) -> None:
    """Gather a chunk's weights now, and stop gathering them in its forward pass (`optimizer.overlap_param_gather`)."""
    ddp.disable_forward_pre_hook(param_sync=True)
    if parameters := fp8_parameters([ddp]):
        post_all_gather_processing(parameters)
