"""Recompute: what the backward pass needs is computed again there, instead of being kept from the forward pass.

    none        keep everything
    selective   keep all but what is cheap to compute again: the attention proper, and the norms' outputs
    full        keep the input of every layer, and run the layer again: a third more computation

What megatron-core 0.16.1 can leave out of a layer by name (`recompute_modules`), and what `selective` makes of it:

    core_attn       yes   scores and weighted sum from q, k and v
    layernorm       yes   the inputs of the attention and of the MLP, from the residual stream
    mlp             no    a dense layer's MLP is most of its computation: that would be nearly `full`
    shared_experts  no    a ninth of the experts at work: little memory for as much computation
    moe             no    our layer (model.moe) has a forward pass of its own, which does not know it; `full` does it
    moe_act         no    refused without grouped experts, which the torch backend has not

Routers count tokens and charge the balance loss in the run that gradients flow through, so once, whatever is chosen.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from model.config import ConfigError

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    # Only `uniform` hands the table of members (model.moe) to the layers that are not computed again.
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

# megatron-core says at every start that kernels which never keep the scores gain little from `core_attn`.
warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer implementation")


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
    """A choice in the names of megatron-core's TransformerConfig."""
    return RECOMPUTE[choice]
