"""Counts the parameters that each rank of a layout holds, from the table of weight names alone.

Nothing is built, so no process group, device or memory is needed. Ranks of one pipeline stage hold equally many
parameters: tensor, expert and expert-tensor parallelism divide evenly (`ParallelConfig.check`), and context and data
parallelism repeat.

    vision=images     every tensor rank has the whole tower and adapter
    vision=tensor     their linear layers are split over the tensor ranks
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import prod
from typing import NamedTuple

from model.config import GlmvConfig
from model.lora_config import LoraConfig
from model.lora_targets import selected_sites
from model.parallel import ParallelConfig
from model.parameter_marks import VISION_PARTS
from model.parts import part_of
from model.pipeline_layout import DECODER
from model.weights.table import weights

# What tensor parallelism splits: column-parallel weights with their biases, row-parallel weights, the vocabulary.
SPLIT = re.compile(
    r"\.(linear_qkv\.\w+|linear_fc1\.\w+|linear_(proj|fc2)\.weight|(word_embeddings|output_layer)\.weight)$"
)
SPLITS_COLUMNS = re.compile(r"\.(linear_proj|linear_fc2)\.weight$")
DECODER_LAYER = re.compile(r"^language_model\.decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"(\.experts\.local_experts\.)\d+\.")
AFTER_THE_LAYERS = ("language_model.decoder.final_layernorm.", "language_model.output_layer.")
BUFFERS = (".expert_bias",)  # in the table of weights, but not parameters


class Group(NamedTuple):
    """A group of parameters that are treated alike."""

    part: str  # vision, adapter, decoder or router
    is_expert: bool  # a routed expert, whose optimizer state is shared by the ranks that hold the same experts


def parameters_by_rank(
    config: GlmvConfig, parallel: ParallelConfig, stages: Sequence[Sequence[str]]
) -> list[Counter[Group]]:
    """Return the parameters that a rank holds, for every pipeline rank.

    Args:
        config: The model.
        parallel: Its layout.
        stages: Units of each pipeline stage, as `PipelineLayout.stages` has them.
    """
    counted = ((name, count * _share(name, parallel)) for name, count in _counts(config).items())
    return _by_pipeline_rank(counted, parallel.pipeline_model_parallel_size, stages)


@lru_cache(maxsize=8)
def _counts(config: GlmvConfig) -> Counter[str]:
    """Return the number of parameters by name; a layer's experts, which are alike, are counted as its first."""
    counts: Counter[str] = Counter()
    for weight in weights(config):
        if not weight.name.endswith(BUFFERS):
            name = EXPERT.sub(r"\g<1>0.", weight.name)
            counts[name] += sum(prod(shape) for shape in weight.hf.values())
    return counts


def adapters_by_rank(
    config: GlmvConfig, parallel: ParallelConfig, stages: Sequence[Sequence[str]], lora: LoraConfig
) -> list[Counter[Group]]:
    """Return the parameters of adapters that a rank holds, for every pipeline rank.

    An adapter's first factor is split where the layer splits its columns, the second where it splits its rows.
    """
    counted = []
    for site in selected_sites(config, lora.targets) if lora.rank else ():
        name = f"{site.linear}.weight"
        share = _share(name, parallel)  # of experts, it is a number of experts: none is split
        whole = share if site.expert is not None else Fraction(1)
        first, second = (share, whole) if SPLITS_COLUMNS.search(name) else (whole, share)
        counted.append((name, lora.rank * (site.width * first + sum(site.rows) * second)))
    return _by_pipeline_rank(counted, parallel.pipeline_model_parallel_size, stages)


def _by_pipeline_rank(
    counted: Iterable[tuple[str, Fraction]], pipeline_size: int, stages: Sequence[Sequence[str]]
) -> list[Counter[Group]]:
    """Sum counts of parameters by the pipeline rank that holds them; a count is a mean over the experts."""
    rank_of_layer = [stage % pipeline_size for stage, units in enumerate(stages) for unit in units if unit == DECODER]
    held: list[dict[Group, Fraction]] = [defaultdict(Fraction) for _ in range(pipeline_size)]
    for name, count in counted:
        rank = pipeline_size - 1 if name.startswith(AFTER_THE_LAYERS) else 0
        if layer := DECODER_LAYER.match(name):
            rank = rank_of_layer[int(layer[1])]
        held[rank][Group(part_of(name), ".experts." in name)] += count
    return [Counter({group: int(count) for group, count in one.items()}) for one in held]


def _share(name: str, parallel: ParallelConfig) -> Fraction:
    """Return the share of a parameter that a rank of its pipeline stage holds, on average over the experts."""
    if ".experts." in name:
        return Fraction(1, parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size)
    is_whole = name.startswith(VISION_PARTS) and parallel.vision == "images"
    return Fraction(1, 1 if is_whole or not SPLIT.search(name) else parallel.tensor_model_parallel_size)
