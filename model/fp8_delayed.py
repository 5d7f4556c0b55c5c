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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
