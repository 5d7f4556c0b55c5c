"""The cost of packs for a model: coefficients with which the data pipeline balances packs."""

from __future__ import annotations

from data_pipeline.plan.pack_cost import PackCost
from model.config import GlmvConfig
from model.flops import decoder_cost, vision_cost


def pack_cost(model: GlmvConfig) -> PackCost:
    """Return the forward FLOPs of a model per token, patch and pair of them, from `model.flops`."""
    decoder, vision = decoder_cost(model.decoder), vision_cost(model.vision)
    return PackCost(
        token=decoder.linear, token_squared=decoder.squared, patch=vision.linear, patch_squared=vision.squared
    )
