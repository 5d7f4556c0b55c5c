"""Where a checkpoint keeps each parameter.

megatron-core stores what repeats in one tensor with one more dimension in front, as far as it is alike:

    vision_model.blocks.layers.L.NAME                    vision_model.blocks.layers.NAME [L]
    ...decoder.layers.L.NAME, all layers alike           ...decoder.layers.NAME [L]
    ...decoder.layers.L.NAME, first layers without MoE   ...decoder.layers.L.NAME
    ...mlp.experts.local_experts.E.NAME                  ...mlp.experts.experts.NAME [E]
"""

from __future__ import annotations

import re
from typing import NamedTuple

from model.config import GlmvConfig

VISION_LAYER = re.compile(r"(vision_model\.blocks\.layers\.)(\d+)\.")
DECODER_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)\.")
EXPERT = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.")


class Place(NamedTuple):
    """Where a parameter is: at an index of the first dimension of a stored tensor, or a stored tensor of its own."""

    key: str
    at: tuple[int, ...] = ()  # empty, or the index
    size: tuple[int, ...] = ()  # empty, or the size of that dimension


def place_of(name: str, config: GlmvConfig) -> Place:
    """Return where a checkpoint has the parameter `name`, a name of the table of weights."""
    if expert := EXPERT.match(name):
        return Place(
            f"{expert[1]}experts.{name[expert.end() :]}", (int(expert[2]),), (config.decoder.n_routed_experts,)
        )
    if layer := VISION_LAYER.match(name):
        return Place(layer[1] + name[layer.end() :], (int(layer[2]),), (config.vision.depth,))
    if (layer := DECODER_LAYER.match(name)) and not config.decoder.is_moe:
        return Place(layer[1] + name[layer.end() :], (int(layer[2]),), (config.decoder.num_hidden_layers,))
    return Place(name)
