"""LoRA: low-rank adapters beside frozen linear layers, exact in every layout.

An adapter of rank r holds A [r, in] and B [out, r], and its linear layer returns

    W x  +  alpha / r * B (A x)

Adapters are added to a model that is already filled with weights. Each is a module inside its linear layer, whose
output a forward hook adds up, so that both backends share this code. How A and B are split over tensor ranks:

    the layer splits     A                      B                     between A and B
    its rows             whole on every rank    rows, as the layer    z = A x is gathered (sequence parallel) or copied
    its columns          columns, as the layer  whole on every rank   z is summed over ranks, and scattered again
    nothing, experts     whole                  whole                 nothing

Under sequence parallelism, a factor that is whole on every rank sees only its rank's tokens. megatron-core sums its
gradient over tensor ranks, because it is marked `sequence_parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from model.hf_weights import canonical_name
from model.lora_targets import LoraConfig, Site, selected_sites
from model.parallel import vision_groups
from model.parameter_marks import VISION_PARTS, mark_parameters

if TYPE_CHECKING:
    from model.glmv import GlmvModel

ADAPTERS = "lora"  # name of the module in a linear layer that holds its adapters


class Adapter(nn.Module):
    """One adapter, or a tensor rank's part of it.

    Args:
        site: The adapted matrix.
        config: Rank and scale.
        weight: This rank's part of the layer's matrix, which tells dtype, device and what is split.
        group: Tensor ranks that share the layer.
        sequence_parallel: Whether the layer gathers, or scatters, the sequence.
    """

    def __init__(self, site: Site, config: LoraConfig, weight: Tensor, group: Any, sequence_parallel: bool) -> None:
        super().__init__()
        self.site, self.scale, self.group = site, config.scale, group
        self.sequence_parallel = sequence_parallel
        self.splits_columns = weight.size(1) != site.width
        row_ranks = sum(site.layer_rows) // weight.size(0)
        self.splits_rows = row_ranks > 1
        self.factors = ["a", *(f"b{block}" for block in range(len(site.rows)))]
        shapes = [(config.rank, weight.size(1)), *((rows // row_ranks, config.rank) for rows in site.rows)]
        for name, shape in zip(self.factors, shapes, strict=True):
            factor: Any = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            factor.tensor_model_parallel = self.split_dim(name) is not None
            factor.sequence_parallel = sequence_parallel and not factor.tensor_model_parallel
            self.register_parameter(name, factor)

    def split_dim(self, factor: str) -> int | None:
        """Return the dimension of `a` or a block of B that is split over tensor ranks."""
        if factor == "a":
            return 1 if self.splits_columns else None
        return 0 if self.splits_rows else None

    @property
    def blocks(self) -> list[Tensor]:
        """The blocks of B."""
        return [getattr(self, name) for name in self.factors[1:]]

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input [tokens, ..., in] to what is added to this matrix's output."""
        z = self._exchange(F.linear(x, self.get_parameter("a"))) * self.scale
        outputs = [F.linear(z, block) for block in self.blocks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _exchange(self, z: Tensor) -> Tensor:
        if self.splits_rows:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(z, group=self.group)
            return copy_to_tensor_model_parallel_region(z, group=self.group)
        if self.splits_columns:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(z, group=self.group)
            return reduce_from_tensor_model_parallel_region(z, group=self.group)
        return z


class LinearAdapters(nn.ModuleDict):
    """The adapters of one linear layer, by the last words of their matrices' names.

    Args:
        adapters: Adapters of some of the layer's matrices.
        weight: This rank's part of the layer's matrix.
    """

    def __init__(self, adapters: Sequence[Adapter], weight: Tensor) -> None:
        super().__init__({adapter.site.leaf: adapter for adapter in adapters})
        site = adapters[0].site
        ranks = sum(site.layer_rows) // weight.size(0)
        self.rows = [rows // ranks for rows in site.layer_rows]
        self.groups = max(1, site.groups // ranks)
        self.leaf_of_part = {adapter.site.part: adapter.site.leaf for adapter in adapters}

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, in the order of its rows."""
        outputs = {part: self[leaf](x) for part, leaf in self.leaf_of_part.items()}
        like = next(iter(outputs.values()))
        if len(self.rows) == 1:
            return like
        parts = [
            outputs[part] if part in outputs else like.new_zeros(*like.shape[:-1], rows)
            for part, rows in enumerate(self.rows)
        ]
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-1).flatten(-2)


class ExpertAdapters(nn.ModuleList):
    """The adapters of a linear layer that holds all experts of a rank, one `LinearAdapters` per expert."""

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Return what is added to the layer's output for tokens that are sorted by expert."""
        parts = x.split(list(tokens_per_expert))
        return torch.cat([adapters(part) for adapters, part in zip(self, parts, strict=True)])


# --- adding them to a model -------------------------------------------------------------------------------------------


def add_adapters(model: GlmvModel, config: LoraConfig, dtype: torch.dtype | None = None) -> None:
    """Add adapters to one chunk of a model and freeze everything else, before DDP wraps it.

    Their factors are zero until `model.lora_weights` or a checkpoint fills them.

    Args:
        model: The chunk.
        config: Rank, scale and targets.
        dtype: Dtype of the adapters; that of the weights if None.

    Raises:
        ConfigError: A target matches nothing.
    """
    model.requires_grad_(False)
    model.lora = config
    by_linear: dict[str, list[Site]] = {}
    for site in selected_sites(model.glmv_config, config.targets):
        by_linear.setdefault(site.linear, []).append(site)
    for name, module in list(model.named_modules()):
        if found := _adapted_weights(model, name, module, by_linear):
            adapters: Any = _adapters_for(model, name, found, config)
            if dtype is not None:
                adapters.to(dtype)
            module.add_module(ADAPTERS, adapters)
            adapters.hook = module.register_forward_hook(_add_to_output)
    vision = getattr(model, "vision_model", None)
    if vision is not None and any(True for _ in adapters_of(vision)):
        vision.blocks.register_forward_pre_hook(_let_gradients_through, with_kwargs=True)
    model.language_model.decoder.register_forward_pre_hook(_let_gradients_through, with_kwargs=True)
    mark_parameters(model, model.parallel.vision)


def remove_adapters(linear: Any) -> None:
    """Remove the adapters of one linear layer."""
    linear.lora.hook.remove()
    del linear.lora


def _adapted_weights(
    model: GlmvModel, name: str, module: nn.Module, by_linear: Mapping[str, list[Site]]
) -> dict[str, tuple[Tensor, list[Site]]]:
    """Return the weights of a linear layer that get adapters: `weight`, or `weightN` of each local expert N."""
    found = {}
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
        return LinearAdapters([Adapter(site, config, weight, group, in_sequence) for site in sites], weight)

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


def adapters_of(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapters that a model, or a part of it, holds, with their names in it."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))
