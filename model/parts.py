"""The parts of the model that can be frozen or have their own learning rate.

    vision    the tower: patch embedding, position table, blocks, norms, downsample
    adapter   the patch merger
    decoder   embedding, layers, norm, output layer
    router    the decoder's routers: can have their own learning rate, but are frozen with the decoder

A frozen part never changes: its parameters get no gradient and no weight decay, do not count in the gradient norm, and
cost nothing in the backward pass. Expert biases are buffers, not parameters, so a caller that freezes the decoder must
also build the model without bias updates. It must also drop the balance loss, whose gradient would flow through the
frozen layers into the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from model.config import ConfigError

MODULES = {"vision": "vision_model", "adapter": "adapter", "decoder": "language_model"}


def check_freeze(parts: Sequence[str]) -> None:
    """Check the value of `freeze`.

    Raises:
        ConfigError: A part is unknown or named twice, or nothing is left to train.
    """
    for part in parts:
        if part not in MODULES:
            raise ConfigError(f"freeze names {part!r}: choose from {', '.join(MODULES)}")
        if parts.count(part) > 1:
            raise ConfigError(f"freeze names {part!r} twice: name it once")
    if len(parts) == len(MODULES):
        raise ConfigError(f"freeze={list(parts)} leaves nothing to train: remove a part")


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze parts of a GlmvModel, before DDP wraps it. Parts that this pipeline stage does not hold are ignored."""
    for part in parts:
        module = getattr(model, MODULES[part], None)
        if module is not None:
            module.requires_grad_(False)


def part_of(name: str) -> str:
    """Return the part of a parameter, from its name in the model or in a wrapper of the model.

    >>> part_of("module.vision_model.patch_embed.weight")
    'vision'
    >>> part_of("language_model.decoder.layers.1.mlp.router.weight"), part_of("language_model.output_layer.weight")
    ('router', 'decoder')
    """
    path = name.split(".")
    if "router" in path:
        return "router"
    return next(part for part, module in MODULES.items() if module in path)
