"""The parts of the model that can be frozen or have their own learning rate.

    vision    the tower: patch embedding, position table, blocks, norms, downsample
    adapter   the patch merger
    decoder   embedding, layers, norm, output layer
    router    the decoder's routers, weights and expert biases: frozen alone or with the decoder

A frozen part never changes: its parameters get no gradient and no weight decay, do not count in the gradient norm, and
cost nothing in the backward pass. Expert biases are buffers, not parameters, so a caller that freezes the routers must
also build the model without bias updates. It must also drop the balance loss, whose gradient would flow through the
frozen routers into the layers below them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.config import ConfigError

if TYPE_CHECKING:  # the configuration is checked without torch, which takes a second to import
    from torch import nn

MODULES = {"vision": "vision_model", "adapter": "adapter", "decoder": "language_model"}
ROUTER = "router"  # a part of the decoder's modules


def check_freeze(parts: Sequence[str]) -> None:
    """Check the value of `freeze`.

    Raises:
        ConfigError: A part is unknown or named twice, or nothing is left to train.
    """
    for part in parts:
        if part not in (*MODULES, ROUTER):
            raise ConfigError(f"freeze names {part!r}: choose from {', '.join((*MODULES, ROUTER))}")
        if parts.count(part) > 1:
            raise ConfigError(f"freeze names {part!r} twice: name it once")
    if {ROUTER, "decoder"} <= set(parts):
        raise ConfigError("freeze names decoder and router, but the routers are frozen with the decoder; remove router")
    if len(parts) == len(MODULES) and ROUTER not in parts:
        raise ConfigError(f"freeze={list(parts)} leaves nothing to train: remove a part")


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze parts of a GlmvModel, before DDP wraps it. Parts that this pipeline stage does not hold are ignored."""
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part in parts or (part == ROUTER and "decoder" in parts):
            parameter.requires_grad_(False)


def part_of(name: str) -> str:
    """Return the part of a parameter, from its name in the model or in a wrapper of the model.

    >>> part_of("module.vision_model.patch_embed.weight")
    'vision'
    >>> part_of("language_model.decoder.layers.1.mlp.router.weight"), part_of("language_model.output_layer.weight")
    ('router', 'decoder')
    """
    path = name.split(".")
    if ROUTER in path:
        return ROUTER
    return next(part for part, module in MODULES.items() if module in path)
