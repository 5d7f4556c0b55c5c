"""The matrices that LoRA can adapt, by their names in transformers' model, and the choice that `lora.targets` makes.

transformers keeps query, key and value apart, and stacks the matrices of all routed experts; PEFT adapts what
transformers has. So an adapter belongs to a module or parameter of transformers' model, and one linear layer of this
model may have several:

    linear_qkv of the decoder      self_attn.q_proj, self_attn.k_proj, self_attn.v_proj
    linear_fc1 of a gated MLP      mlp.gate_proj, mlp.up_proj; in GLM-4.1V's decoder mlp.gate_up_proj
    linear_fc1 of a routed expert  its part of mlp.experts.gate_up_proj
    others                         one: self_attn.o_proj, mlp.down_proj, attn.qkv, attn.proj, merger.proj ...

Routers, embeddings, norms and the output layer are not adapted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from model.config import ConfigError, GlmvConfig
from model.lora_config import LoraConfig
from model.parts import part_of
from model.weights.table import COPY, FUSED_UP, QKV, Transform, Weight, weights

ALL_LINEAR = "all-linear"
LINEAR = re.compile(r"(.*\.linear_(?:qkv|proj|fc1|fc2)|adapter\.proj)\.weight")
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj")


@dataclass(frozen=True)
class Site:
    """One matrix that an adapter can be added to."""

    module: str  # name of the module in transformers' model; of the stacked parameter for routed experts
    linear: str  # the linear layer of the whole model that holds it
    part: int  # which of the matrices stacked in that layer
    layer_rows: tuple[int, ...]  # output sizes of all matrices stacked in that layer
    groups: int  # number of blocks in which the layer interleaves them: key-value groups, or 1
    rows: tuple[int, ...]  # output sizes of its blocks: two for gate and up in one matrix
    width: int  # input size
    transform: Transform  # from the rows of transformers to the rows here
    expert: int | None = None  # which routed expert

    @property
    def leaf(self) -> str:
        """The last word of the module's name."""
        return self.module.rpartition(".")[2]

    @property
    def adapter(self) -> str:
        """The name of the adapter in the whole model."""
        return f"{self.linear}.lora.{self.leaf}"


def sites(config: GlmvConfig) -> Iterator[Site]:
    """Yield all matrices of a model that can be adapted, in the order of the table of weights."""
    for weight in weights(config):
        if found := LINEAR.fullmatch(weight.name):
            groups = config.decoder.num_key_value_heads if weight.transform is QKV else 1
            yield from _sites_of(found[1], weight, groups)


def _sites_of(linear: str, weight: Weight, groups: int) -> Iterator[Site]:
    modules = [name.removesuffix(".weight") for name in weight.hf]
    all_rows = tuple(rows for rows, _ in weight.hf.values())
    width = next(iter(weight.hf.values()))[1]
    if expert := EXPERT.fullmatch(modules[0]):
        name = f"{expert[1]}.{'down_proj' if len(modules) == 1 else 'gate_up_proj'}"
        yield Site(name, linear, 0, (sum(all_rows),), 1, all_rows, width, COPY, int(expert[2]))
    elif weight.transform is FUSED_UP:
        half = all_rows[0] // 2
        yield Site(modules[0], linear, 0, all_rows, 1, (half, half), width, COPY)
    else:
        transform = weight.transform if len(modules) == 1 else COPY
        for part, (module, rows) in enumerate(zip(modules, all_rows, strict=True)):
            yield Site(module, linear, part, all_rows, groups, (rows,), width, transform)


def selected_sites(config: GlmvConfig, targets: Sequence[str]) -> list[Site]:
    """Return the matrices that `lora.targets` names.

    A target is the end of a module's name, with `*` for any characters: `q_proj` is every q_proj. The stacked matrices
    of routed experts are parameters, not modules, so only a target with the word `experts` means them.

    Raises:
        ConfigError: a target matches nothing.
    """
    everything = list(sites(config))
    modules = dict.fromkeys(site.module for site in everything)
    stacked = {site.module for site in everything if site.expert is not None}
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in modules if _matches(name, target, name in stacked)}
        if not matches:
            leaves = dict.fromkeys(_two_last_words(name) for name in modules)
            raise ConfigError(
                f"lora.targets: {target!r} matches nothing in this model; it has {', '.join(leaves)}, and {ALL_LINEAR} "
                "for all but the routed experts"
            )
        chosen |= matches
    return [site for site in everything if site.module in chosen]


def _matches(name: str, target: str, is_stacked: bool) -> bool:
    if target == ALL_LINEAR:
        return not is_stacked
    if is_stacked and "experts" not in target.split("."):
        return False
    return fnmatchcase(f".{name}", f"*.{target}")


def _two_last_words(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def adapted_parts(config: GlmvConfig, lora: LoraConfig) -> set[str]:
    """Return the parts of the model (model.parts) that get adapters.

    Raises:
        ConfigError: a target matches nothing.
    """
    return {part_of(site.linear) for site in selected_sites(config, lora.targets)}
