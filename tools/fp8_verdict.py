"""What tools.fp8_check says of a training in FP8: how far it may be from one in bf16, and how far it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from model.fp8 import Fp8Config
from training.fp8_distance import Fp8Distance, ModuleDistance
from training.metrics import finite_content

# --- limits -----------------------------------------------------------------------------------------------------------

# Relative error of a rounded value, by root mean square over values whose logarithms are spread evenly: neighbours at
# distance q round with an error of q / sqrt(12), and q is 1/8 (E4M3) or 1/4 (E5M2) of a power of two.
ERROR_E4M3, ERROR_E5M2 = 0.0265, 0.0531
MARGIN = 2.0
PRODUCTS_OF_A_LAYER = 4  # in the forward pass: qkv, projection, and two of the MLP; as many in the backward pass


@dataclass(frozen=True)
class Limits:
    """What the distances may be."""

    loss: float
    gradient: float

    def are_kept(self, distance: Fp8Distance) -> bool:
        """Return whether all distances are within the limits. NaN is not."""
        return abs(mean(distance.loss_distances)) <= self.loss and distance.gradient.relative <= self.gradient


def gradient_limit(fp8: Fp8Config) -> float:
    """Return the limit of the gradient's relative difference: MARGIN times that of independent errors in one layer.

    The errors of all layers add up in the residual stream, but so does the stream, so that its relative error stays
    near that of a layer. The margin is for this estimate, and for tokens whose experts change.
    """
    of_gradients = ERROR_E5M2 if fp8.number_format == "hybrid" else ERROR_E4M3
    forward, backward = 2 * ERROR_E4M3**2, ERROR_E4M3**2 + of_gradients**2
    return float(MARGIN * (PRODUCTS_OF_A_LAYER * (forward + backward)) ** 0.5)


# --- report -----------------------------------------------------------------------------------------------------------


def report(distance: Fp8Distance, limits: Limits) -> None:
    """Print the table of losses, the modules and what the limits say."""
    console = Console(width=120)
    console.print(distance.description, markup=False)
    steps = Table("step", Column("loss"), Column("in FP8"), Column("difference"), box=SIMPLE_HEAD)
    for step, (base, fp8) in enumerate(zip(distance.losses, distance.fp8_losses, strict=True), start=1):
        steps.add_row(str(step), f"{base:.4f}", f"{fp8:.4f}", f"{fp8 / base - 1:+.3%}")
    console.print(steps)
    modules = Table(
        Column("gradient of", no_wrap=True),
        "modules",
        "relative difference",
        "largest",
        "cosine, smallest",
        box=SIMPLE_HEAD,
    )
    for kind, found in by_kind(distance.modules):
        relative = [module.relative for module in found]
        smallest = min(module.cosine for module in found)
        modules.add_row(kind, str(len(found)), f"{mean(relative):.3f}", f"{max(relative):.3f}", f"{smallest:.4f}")
    console.print(modules)
    whole = distance.gradient
    console.print(f"loss: {mean(distance.loss_distances):+.3%} on average, limit {limits.loss:.3%}")
    console.print(f"gradient: {whole.relative:.3f}, limit {limits.gradient:.3f}; cosine {whole.cosine:.4f}")
    console.print("within the limits" if limits.are_kept(distance) else "NOT within the limits")


def by_kind(modules: Sequence[ModuleDistance]) -> list[tuple[str, list[ModuleDistance]]]:
    """Return the modules of all layers together: layers.3.mlp.linear_fc1 and layers.4.mlp.linear_fc1 are one kind."""
    kinds: dict[str, list[ModuleDistance]] = {}
    for module in modules:
        kinds.setdefault(re.sub(r"layers\.\d+", "layers.*", module.module), []).append(module)
    return list(kinds.items())


def as_json(distance: Fp8Distance, limits: Limits) -> dict[str, Any]:
    """Return all numbers, with limits and verdict; infinity and NaN as null."""
    content = {**asdict(distance), "loss_distances": distance.loss_distances, "limits": asdict(limits)}
    return {**finite_content(content), "within_limits": limits.are_kept(distance)}
