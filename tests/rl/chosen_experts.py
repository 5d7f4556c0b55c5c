"""transformers' model with routers that are told which experts to choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONE = 255  # where the router chooses for itself


def random_experts(tokens: int, config: Any, rng: np.random.Generator) -> np.ndarray:
    """Return distinct experts for each token and layer; the last token and every ninth have none."""
    shape = tokens, config.num_hidden_layers - config.first_k_dense_replace
    order = rng.random((*shape, config.n_routed_experts)).argsort(-1)
    experts = order[..., : config.num_experts_per_tok].astype(np.uint8)
    experts[4::9] = experts[-1] = NONE
    return experts


@contextmanager
def told(model: Any, experts: np.ndarray) -> Iterator[None]:
    """Let the routers choose, inside, uint8 experts [tokens, layers with experts, experts per token]."""
    routers = [layer.mlp.gate for layer in model.model.language_model.layers if hasattr(layer.mlp, "gate")]
    for router, of_layer in zip(routers, experts.swapaxes(0, 1), strict=True):
        router.forward = _routing(router, torch.from_numpy(of_layer.astype(np.int64)))
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def told_if_any(model: nn.Module, experts: np.ndarray | None) -> Any:
    return nullcontext() if experts is None else told(model, experts)


def _routing(router: Any, experts: Tensor) -> Any:
    """Return the forward pass of a router: weights are the sigmoids of the experts, in parts of their sum, scaled."""

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.flatten(0, -2).float(), router.weight.float())
        scores = logits.sigmoid()
        own = (scores + router.e_score_correction_bias).topk(experts.size(1)).indices
        chosen = torch.where(experts == NONE, own, experts)
        weights = torch.stack([scores[row, of_token] for row, of_token in enumerate(chosen)])
        return logits, weights / weights.sum(1, keepdim=True) * router.routed_scaling_factor, chosen

    return forward
