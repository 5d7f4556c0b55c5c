"""What packs cost the model of a run: the coefficients by which the data pipeline makes packs alike."""

from __future__ import annotations

from data_pipeline.plan.pack_cost import PackCost
from model.config import GlmvConfig
from model.flops import decoder_cost, vision_cost


def pack_cost(model: GlmvConfig) -> PackCost:
    decoder, vision = decoder_cost(model.decoder), vision_cost(model.vision)
    return PackCost(
        token=decoder.linear, token_squared=decoder.squared, patch=vision.linear, patch_squared=vision.squared
    )
