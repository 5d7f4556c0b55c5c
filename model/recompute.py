"""Activation recompute: the backward pass computes activations again instead of keeping them from the forward pass.

    none        keep all activations
    selective   recompute what is cheap: core attention and the outputs of norms
    full        keep the input of each layer and run the layer again: a third more computation

The modules that megatron-core 0.16.1 can recompute by name (`recompute_modules`), and whether `selective` does:

    core_attn       yes   scores and weighted sum, from q, k and v
    layernorm       yes   the inputs of attention and MLP, from the residual stream
    mlp             no    most of a dense layer's computation: nearly `full`
    shared_experts  no    one of nine active experts: saves little memory for its computation
    moe             no    the forward pass of model.moe.SegmentMoELayer does not support it; `full` covers it
    moe_act         no    the experts' activations, between their two matrices; not measured

Routers count tokens and add the balance loss only in the run with gradients, so exactly once for each choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from model.config import ConfigError

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    # Only `uniform` passes the table of segment members (model.moe) to layers that are not recomputed.
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass
class RecomputeConfig:
    """Activations that the backward pass computes again, instead of keeping them from the forward pass."""

    # of the decoder's layers: none, selective (core attention and norms) or full (everything inside a layer, which adds
    # a third of computation)
    decoder: str = "none"
    vision: str = "none"  # of the vision tower's blocks: none, selective or full

    def __post_init__(self) -> None:
        for key, choice in asdict(self).items():
            if choice not in RECOMPUTE:
                raise ConfigError(f"recompute.{key}={choice!r}: choose one of {', '.join(RECOMPUTE)}")


def recompute_fields(choice: str) -> dict[str, Any]:
    """Return a choice as fields of megatron-core's TransformerConfig."""
    return RECOMPUTE[choice]
