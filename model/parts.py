"""The parts of the model that can be frozen or given a learning rate of their own.

    vision    the tower: patch embedding, position table, blocks, norms, downsample
    adapter   the patch merger
    decoder   embedding, layers, norm, head
    router    the decoder's routers: a learning rate of their own, but frozen with the decoder

A frozen part is left as it is to the bit: no parameter of it takes a gradient, is decayed or is counted in the gradient
norm, and nothing is computed in the backward pass for its sake alone. The routers' expert biases are no parameters: who
freezes the decoder builds the model without bias updates, and without the balance loss, whose gradient would reach
through the frozen layers into the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from model.config import ConfigError

MODULES = {"vision": "vision_model", "adapter": "adapter", "decoder": "language_model"}


def check_freeze(parts: Sequence[str]) -> None:
    """Raises ConfigError: a part is unknown or named twice, or none is left to train."""
    for part in parts:
        if part not in MODULES:
            raise ConfigError(f"freeze names {part!r}: choose from {', '.join(MODULES)}")
        if parts.count(part) > 1:
            raise ConfigError(f"freeze names {part!r} twice: name it once")
    if len(parts) == len(MODULES):
        raise ConfigError(f"freeze={list(parts)} leaves nothing to train: take one part out")


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Take parts of a GlmvModel out of training, before it is wrapped for it. A pipeline stage may lack a part."""
    for part in parts:
        module = getattr(model, MODULES[part], None)
        if module is not None:
            module.requires_grad_(False)


def part_of(name: str) -> str:
    """The part that a parameter is in, by its name in the model, or in a wrapper of it.

    >>> part_of("module.vision_model.patch_embed.weight")
    'vision'
    >>> part_of("language_model.decoder.layers.1.mlp.router.weight"), part_of("language_model.output_layer.weight")
    ('router', 'decoder')
    """
    path = name.split(".")
    if "router" in path:
        return "router"
    return next(part for part, module in MODULES.items() if module in path)
