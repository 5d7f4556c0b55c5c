"""The scales of recipe `delayed` of a whole model: moved once a step, saved and loaded (model.fp8_delayed)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from model.canonical_names import canonical_name
from model.fp8_delayed import DelayedScales


def delayed_scales(model_chunks: Sequence[nn.Module]) -> Iterator[tuple[str, DelayedScales]]:
    """Yield the scales of this rank's linear layers, by the layers' names in the whole model."""
    for chunk in model_chunks:
        for name, module in chunk.named_modules():
            if isinstance(scales := getattr(module, "delayed_scales", None), DelayedScales):
                yield canonical_name(chunk, f"{name}.weight").removesuffix(".weight"), scales


def end_step(model_chunks: Sequence[nn.Module], *, updated: bool) -> None:
    """Move all scales to the next step, or forget the step if it was skipped. Collective."""
    every = [scales for _, scales in delayed_scales(model_chunks)]
    if not every:
        return
    if updated:
        amaxes = torch.stack([scales.amax for scales in every])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
        for scales, own in zip(every, amaxes.tolist(), strict=True):
            scales.update(own)
    for scales in every:
        scales.amax.zero_()


def gather_scales(model_chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Return the state of all scales of the model, for a checkpoint; empty with another recipe. Collective."""
    own = {name: scales.state_dict() for name, scales in delayed_scales(model_chunks)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: state for states in everyone for name, state in states.items()}


def load_scales(model_chunks: Sequence[nn.Module], states: Mapping[str, Any]) -> None:
    """Give this rank's scales their state from a checkpoint. Those that it does not have begin at 1."""
    for name, scales in delayed_scales(model_chunks):
        if name in states:
            scales.load_state_dict(states[name])
