"""The tensors of adapters: their names in files of PEFT, filling a model with them, merging them into its weights.

PEFT's tensors of a module are `base_model.model.MODULE.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. Routed
experts share one pair per parameter of transformers' `mlp.experts`, with the experts next to each other:

    lora_A.weight  [experts * r, in]    row     e * r + i         is row i of expert e's A
    lora_B.weight  [out, r * experts]   column  i * experts + e   is column i of expert e's B

PEFT wraps `mlp.experts` once per adapted parameter. Where both are adapted, gate_up_proj is the inner one, and its
tensors are called `mlp.experts.base_layer.lora_A.weight` and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from model.canonical_names import canonical_name
from model.config import GlmvConfig
from model.lora_config import LoraConfig
from model.lora_layers import ADAPTERS, Adapter, adapters_of
from model.lora_targets import Site, selected_sites
from model.weights.random_weights import generator_of
from model.weights.source import WeightSource, check_names_and_shapes, whole
from model.weights.table import Weight, sizes

if TYPE_CHECKING:
    from model.glmv import GlmvModel

PEFT_PREFIX = "base_model.model."


# --- names ------------------------------------------------------------------------------------------------------------


def peft_names(chosen: Sequence[Site]) -> dict[str, str]:
    """Return the names of PEFT's pairs of tensors, without `.lora_A.weight`, by the sites' modules."""
    modules = {site.module for site in chosen}
    names = {}
    for site in chosen:
        name = site.module
        if site.expert is not None:
            name, _, parameter = site.module.rpartition(".")
            if parameter == "gate_up_proj" and f"{name}.down_proj" in modules:
                name += ".base_layer"
        names[site.module] = PEFT_PREFIX + name
    return names


def peft_shapes(config: GlmvConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a PEFT adapter."""
    chosen = selected_sites(config, lora.targets)
    names = peft_names(chosen)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in chosen:
        rank = lora.rank * (1 if site.expert is None else config.decoder.n_routed_experts)
        shapes[f"{names[site.module]}.lora_A.weight"] = (rank, site.width)
        shapes[f"{names[site.module]}.lora_B.weight"] = (sum(site.rows), rank)
    return shapes


# --- filling ----------------------------------------------------------------------------------------------------------


class RandomAdapters:
    """New adapters by PEFT's names: A is uniform as PEFT draws it, a function of the seed and its name; B is zero."""

    def __init__(self, config: GlmvConfig, lora: LoraConfig, seed: int) -> None:
        self.seed = seed
        self._shapes = peft_shapes(config, lora)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor, which are the same at every call."""
        shape = self._shapes[name]
        if name.endswith(".lora_B.weight"):
            return torch.zeros(shape)[start:stop]
        bound = shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(self.seed, name))[start:stop]

    def where(self, name: str) -> str:
        """Return where a tensor comes from."""
        return f"random adapters of seed {self.seed}"


@torch.no_grad()
def fill_adapters(model_chunks: Sequence[GlmvModel], source: WeightSource) -> None:
    """Fill the adapters that this rank holds.

    Args:
        model_chunks: What this rank holds of the model, with adapters.
        source: Their tensors by PEFT's names.

    Raises:
        WeightsError: the source does not hold exactly the adapters' tensors.
    """
    config, lora = _configs(model_chunks[0])
    check_names_and_shapes(source, peft_shapes(config, lora))
    names = peft_names(selected_sites(config, lora.targets))
    size, experts = sizes(config), config.decoder.n_routed_experts
    for module, adapters in _by_module(adapter for chunk in model_chunks for _, adapter in adapters_of(chunk)).items():
        whole_a, whole_b = (whole(source, f"{names[module]}.lora_{factor}.weight") for factor in "AB")
        for adapter in adapters:
            site, a, b = adapter.site, whole_a, whole_b
            if site.expert is not None:
                a, b = a.unflatten(0, (experts, -1))[site.expert], b.unflatten(1, (-1, experts))[..., site.expert]
            b = site.transform.to_megatron([b], size)
            for factor, full in zip(adapter.factors, (a, *b.split(site.rows)), strict=True):
                dim = adapter.split_dim(factor)
                own = full if dim is None else full.chunk(adapter.group.size(), dim)[adapter.group.rank()]
                adapter.get_parameter(factor).copy_(own)


def _by_module(adapters: Iterable[Adapter]) -> dict[str, list[Adapter]]:
    """Return adapters by their module in transformers' model; those of routed experts in the order of the experts."""
    modules: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        modules.setdefault(adapter.site.module, []).append(adapter)
    return {module: sorted(found, key=lambda adapter: adapter.site.expert or 0) for module, found in modules.items()}


def _configs(model: GlmvModel) -> tuple[GlmvConfig, LoraConfig]:
    assert model.lora is not None, "the model has no adapters"
    return model.glmv_config, model.lora


# --- merging ----------------------------------------------------------------------------------------------------------


def adapted_weights(model: GlmvModel) -> Iterator[tuple[str, Tensor, list[Adapter]]]:
    """Yield the matrices of this rank that have adapters: canonical name, matrix and adapters."""
    for name, module in model.named_modules():
        if module is model or not hasattr(module, ADAPTERS):  # the model's own attribute is its LoraConfig
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.dim() == 2:
                layer: Any = getattr(module, ADAPTERS)
                layer = layer if leaf == "weight" else layer[int(leaf.removeprefix("weight"))]
                yield canonical_name(model, f"{name}.{leaf}"), weight, list(layer.values())


class Factors(NamedTuple):
    """An adapter with whole factors."""

    site: Site
    scale: float
    a: Tensor  # [r, in]
    b: Tensor  # [out, r], all blocks


def change(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return what an adapter adds to rows of a matrix, float32 [rows, in].

    Args:
        a: [r, in].
        b: [rows, r].
        scale: `lora.alpha` over the rank.
    """
    return scale * (b.float() @ a.float())


def merged(row: Weight, matrix: Tensor, adapters: Sequence[Factors], size: dict[str, int]) -> Tensor:
    """Return a whole matrix with its adapters added, in its dtype."""
    products = {one.site.part: change(one.a, one.b, one.scale) for one in adapters}
    layer_rows, width = adapters[0].site.layer_rows, adapters[0].site.width
    if len(layer_rows) == 1:
        added = products[0]
    else:
        parts = [products.get(part, matrix.new_zeros(rows, width).float()) for part, rows in enumerate(layer_rows)]
        added = row.transform.to_megatron(parts, size)
    return (matrix.float() + added).to(matrix.dtype)
