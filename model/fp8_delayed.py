"""Scales of recipe `delayed`, emulated: they come from the largest magnitudes (amax) of earlier steps.

    step            1      2      3      4        scale of step 5, with a history of 3 steps:
    amax of x     2.0    8.0    1.0    4.0        largest / 8.0

Each quantised linear layer has a scale for its input, its weight and the gradient of its output, all 1 at first. Within
a step the scales stay as they are, so that recomputed layers and steps that are computed twice give the same values.
After the update of a step, the ranks that share the weights take the largest amax (megatron-core's amax reduction
group: tensor, context and data parallel ranks), and every scale follows the largest of its history. Transformer Engine
does the same after each micro-batch. A step that is skipped leaves no trace, and neither does a forward pass without
gradients.

A maximum over a window needs only those amaxes that no later one exceeds. The rest is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from model.canonical_names import canonical_name
from model.fp8 import AMAX_HISTORY
from model.fp8_rounding import NumberFormat

ROLES = ("input", "weight", "gradient")


class DelayedScales:
    """The scales of one linear layer.

    Args:
        formats: The formats of input, weight and gradient.
        device: Where the layer computes.

    Attributes:
        amax: float32 [3], the largest magnitudes of this step so far.
    """

    def __init__(self, formats: Sequence[NumberFormat], device: Any) -> None:
        self.formats = formats
        self.amax = torch.zeros(len(ROLES), device=device)
        self._scales = torch.ones(len(ROLES), device=device)
        self._updates = 0
        self._windows: list[list[tuple[int, float]]] = [[] for _ in ROLES]  # (update, amax), amaxes falling

    def scale(self, role: str) -> Tensor:
        """Return the scale of this step, float32 []."""
        return self._scales[ROLES.index(role)]

    def observe(self, role: str, operand: Tensor) -> None:
        """Note the magnitude of an operand."""
        if operand.numel():
            own = self.amax[ROLES.index(role)]
            own.copy_(torch.maximum(own, operand.detach().abs().amax().float()))

    def update(self, amaxes: Sequence[float]) -> None:
        """Begin the next step, with the amaxes of the last one over all ranks."""
        self._updates += 1
        for window, amax in zip(self._windows, amaxes, strict=True):
            if math.isfinite(amax) and amax > 0:
                while window and window[-1][1] <= amax:
                    window.pop()
                window.append((self._updates, amax))
            if len(window) > 1 and window[0][0] <= self._updates - AMAX_HISTORY:
                del window[0]
        self._set_scales()

    def _set_scales(self) -> None:
        largest = torch.finfo(torch.float32).max
        for number, (window, form) in enumerate(zip(self._windows, self.formats, strict=True)):
            if window:
                self._scales[number] = min(form.largest / window[0][1], largest)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next scales follow from, in JSON's types."""
        return {"updates": self._updates, **dict(zip(ROLES, self._windows, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        self._updates = state["updates"]
        self._windows = [[(update, amax) for update, amax in state[role]] for role in ROLES]
        self._set_scales()


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
