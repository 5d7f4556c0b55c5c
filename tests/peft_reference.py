"""transformers' model with adapters of PEFT, as the independent reference of LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.reference import small_config, transformers_model

RANK, ALPHA = 4, 6
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "attn.qkv", "attn.proj", "merger.proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
UP_IN_TOWER = [f"model.visual.{module}.up_proj.weight" for module in ("blocks.0.mlp", "blocks.1.mlp", "merger")]
# Names of a choice of targets: in lora.targets, and as PEFT's target_modules and target_parameters. For a mixture of
# experts PEFT reads gate_proj, up_proj and down_proj among target_modules as the routed experts, so that the other MLPs
# must be given as parameters.
TARGETS: dict[str, tuple[list[str], list[str], list[str] | None]] = {
    "all": (["all-linear", "experts.*"], LINEAR, [*EXPERTS, *(f"{module}.weight" for module in MLP)]),
    "all dense": (["all-linear"], [*LINEAR, *MLP, "gate_up_proj"], None),
    "modules": (["all-linear"], [*LINEAR, *MLP], None),  # what PEFT has dropout for
    "some": (["k_proj", "visual.*.up_proj", "experts.down_proj"], ["k_proj"], [*UP_IN_TOWER, *EXPERTS[1:]]),
}


def peft_model(variant: str, targets: str, seed: int = 5) -> Any:
    """Return transformers' tiny model with adapters whose factors are random, B included."""
    _, modules, parameters = TARGETS[targets]
    model: Any = transformers_model(small_config(variant))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, target_parameters=parameters)
    model_type = model.config.model_type
    if targets == "modules":
        model.config.model_type = "other"  # a name for which PEFT takes no module for the routed experts
    adapted = peft.get_peft_model(model, config)
    model.config.model_type = model_type
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, factor in adapters_of(adapted):
            factor.normal_(
                0, factor.shape[1] ** -0.5 if factor.shape[0] <= factor.shape[1] else 0.2, generator=generator
            )
    return adapted


def in_float64(model: nn.Module) -> None:
    """Let a model compute in float64, so that its gradients are exact for comparisons in float32."""
    model.double()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # type: ignore[union-attr]  # torch's grouped product has no float64


def adapters_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the adapters' tensors by their names in a file of PEFT."""
    return [(name.replace(".default", ""), p) for name, p in model.named_parameters() if "lora_" in name]


def save_adapters(model: Any, folder: Path) -> dict[str, Tensor]:
    """Write an adapter as PEFT does and return its tensors, read back."""
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


class Tensors:
    """A source of tensors by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]

    def where(self, name: str) -> str:
        return "memory"
