"""LoRA: add low-rank adapters to a model that is already filled with weights.

Each is a module inside its linear layer (`model.lora_layers`), whose output a forward hook adds up, so that both
backends share this code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from model.canonical_names import canonical_name
from model.lora_config import LoraConfig
from model.lora_dropout import AdapterDropout
from model.lora_layers import ADAPTERS, Adapter, ExpertAdapters, LinearAdapters, adapters_of
from model.lora_targets import Site, selected_sites
from model.parameter_marks import VISION_PARTS, mark_parameters
from model.process_groups import vision_groups

if TYPE_CHECKING:
    from model.glmv import GlmvModel


def add_adapters(model: GlmvModel, config: LoraConfig, seed: int = 0) -> None:
    """Add adapters to one chunk of a model and freeze everything else, before DDP wraps it.

    Their factors are zero until `model.lora_weights` or a checkpoint fills them.

    Args:
        model: The chunk.
        config: Rank, scale and targets.
        seed: Seed of their dropout.

    Raises:
        ConfigError: A target matches nothing.
    """
    model.requires_grad_(False)
    model.lora = config
    model.adapter_dropout = AdapterDropout(config.dropout, seed)
    by_linear: dict[str, list[Site]] = {}
    for site in selected_sites(model.glmv_config, config.targets):
        by_linear.setdefault(site.linear, []).append(site)
    for name, module in list(model.named_modules()):
        if found := _adapted_weights(model, name, module, by_linear):
            module.add_module(ADAPTERS, _adapters_for(model, name, found, config))
            module.register_forward_hook(_add_to_output)
    vision = getattr(model, "vision_model", None)
    if vision is not None and any(True for _ in adapters_of(vision)):
        vision.blocks.register_forward_pre_hook(_let_gradients_through, with_kwargs=True)
    model.language_model.decoder.register_forward_pre_hook(_let_gradients_through, with_kwargs=True)
    if config.dropout:
        for block in [model.language_model.decoder, *([] if vision is None else [vision.blocks])]:
            model.adapter_dropout.follow(block)
    mark_parameters(model, model.parallel.vision)


def _adapted_weights(
    model: GlmvModel, name: str, module: nn.Module, by_linear: Mapping[str, list[Site]]
) -> dict[str, tuple[Tensor, list[Site]]]:
    """Return the weights of a linear layer that get adapters: `weight`, or `weightN` of each local expert N."""
    found: dict[str, tuple[Tensor, list[Site]]] = {}
    for leaf, weight in module.named_parameters(recurse=False):
        linear, _, kind = canonical_name(model, f"{name}.{leaf}").rpartition(".")
        if kind == "weight" and linear in by_linear:
            found[leaf] = (weight, by_linear[linear])
    return found


def _adapters_for(
    model: GlmvModel, name: str, found: Mapping[str, tuple[Tensor, list[Site]]], config: LoraConfig
) -> nn.Module:
    in_vision = name.startswith(VISION_PARTS)
    group = vision_groups(model.parallel).tp if in_vision else parallel_state.get_tensor_model_parallel_group()
    sequence_parallel = model.config.sequence_parallel and not in_vision

    def layer(weight: Tensor, sites: list[Site]) -> LinearAdapters:
        in_sequence = sequence_parallel and sites[0].expert is None
        dropout = model.adapter_dropout
        return LinearAdapters([Adapter(site, config, weight, group, in_sequence, dropout) for site in sites], weight)

    if "weight" in found:
        return layer(*found["weight"])
    return ExpertAdapters(layer(*found[f"weight{expert}"]) for expert in range(len(found)))


def _add_to_output(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Add what the adapters compute; megatron-core's linear layers return their bias beside the output."""
    added = module.lora(*inputs)
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


def _let_gradients_through(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Ask for the gradient of a block's input, which frozen layers before it do not.

    Otherwise recomputed layers would have no gradients, and a pipeline stage without adapters nothing to go backward
    through.
    """
    hidden_states = kwargs.get("hidden_states")
    if hidden_states is not None and torch.is_grad_enabled():
        hidden_states.requires_grad_()
