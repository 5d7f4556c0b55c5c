"""Which experts transformers' module chooses, for router replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class RouterRecorder:
    """Keeps what all routers of a module have chosen since it was asked last.

    Attributes:
        chosen: uint8 [tokens, experts per token] of each layer with experts, in the order of the forward pass.
    """

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []

    def take(self) -> Tensor:
        """Return what was chosen in one forward pass: uint8 [tokens, layers with experts, experts per token]."""
        chosen = torch.stack(self.chosen, dim=1)
        self.chosen.clear()
        return chosen

    def keep(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the experts that a router returns after logits and weights."""
        self.chosen.append(output[2].to(torch.uint8))


@contextmanager
def recorded_routers(module: Any) -> Iterator[RouterRecorder]:
    """Record what the routers of transformers' model choose inside.

    Args:
        module: From `build_module`, with experts.
    """
    recorder = RouterRecorder()
    layers = module.model.language_model.layers
    hooks = [layer.mlp.gate.register_forward_hook(recorder.keep) for layer in layers if hasattr(layer.mlp, "gate")]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
