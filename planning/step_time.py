"""A model of the time of a training step, to rank layouts. It does not promise a throughput.

    time of a pack on a stage    matrix products + attention + memory-bound operations + communication in layers
    time of a step               slowest stage * (packs + bubble) + reduction of gradients + gathering of weights
                                 + update of the optimizer

Rates are those of an H100 with NVLink in a node and 400 Gbit/s per GPU between nodes, times an efficiency. They were
not measured here. `calibrated` multiplies the time by one factor, from a run that was.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.config import ConfigError, GlmvConfig
from model.flops import head_cost, layer_cost, vision_cost
from model.parallel import ParallelConfig
from model.pipeline_layout import DECODER, EMBEDDING, LOSS, PipelineLayout
from model.rank_sizes import parameters_by_rank
from planning.packs import PackShape, packs_per_rank
from training.config import RunConfig

GPUS_PER_NODE = 8
BYTES = 2  # of an activation, bf16
WARM_UP = 5  # first steps of a run, which are slower
PASSES = {"none": 3.0, "selective": 3.0, "full": 4.0}  # of the decoder's matrix products, in forward passes
ATTENTION_PASSES = {"none": 3.5, "selective": 4.5, "full": 4.5}
MEMORY_PASSES = 60  # times that a layer reads or writes its tokens' hidden states outside of matrix products


@dataclass(frozen=True)
class Rates:
    """What a GPU and its network reach."""

    dense: float = 989e12 * 0.60  # FLOP/s of dense matrix products in bf16
    grouped: float = 989e12 * 0.42  # of the experts' grouped products, which are small
    attention: float = 989e12 * 0.45
    memory: float = 3.35e12 * 0.75  # bytes/s
    in_node: float = 450e9 * 0.70  # bytes/s that a GPU sends to others of its node
    between_nodes: float = 50e9 * 0.80
    hidden: float = 0.7  # share of the data-parallel traffic that is hidden behind computation
    factor: float = 1.0  # of the whole, from `calibrated`

    def link(self, ranks: int, neighbours: int = 1) -> float:
        """Return the bytes/s in a group of `ranks` ranks, of which `neighbours` numbers lie between two."""
        return self.in_node if ranks * neighbours <= GPUS_PER_NODE else self.between_nodes


@dataclass(frozen=True)
class StepTime:
    """The predicted seconds of a step, by what they are spent on; of the slowest stage."""

    seconds: float
    parts: dict[str, float]


def step_time(
    config: RunConfig, model: GlmvConfig, layout: PipelineLayout, typical: PackShape, processes: int, rates: Rates
) -> StepTime:
    """Predict the time of a step of typical packs."""
    parallel, packs = config.parallel, packs_per_rank(config, processes)
    stages = [
        _stage_time(config, model, layout.stages[number], number, layout, typical, rates)
        for number in range(len(layout.stages))
    ]
    size = layout.pipeline_size
    by_rank = [_added(stages[rank::size]) for rank in range(size)]
    slowest = max(by_rank, key=lambda parts: sum(parts.values()))
    parts = {name: seconds * packs for name, seconds in slowest.items()}
    virtual = parallel.virtual_pipeline_model_parallel_size
    parts["bubble"] = sum(slowest.values()) * (size - 1) / virtual
    parts |= _per_step(config, model, layout, processes, rates)
    parts = {name: seconds * rates.factor for name, seconds in parts.items() if seconds}
    return StepTime(sum(parts.values()), parts)


def _added(stages: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one.get(name, 0) for one in stages) for one in stages for name in one}


def _stage_time(
    config: RunConfig,
    model: GlmvConfig,
    units: Sequence[str],
    number: int,
    layout: PipelineLayout,
    typical: PackShape,
    rates: Rates,
) -> dict[str, float]:
    """Return the seconds of a pack, forward and backward, on one stage."""
    parallel, decoder = config.parallel, model.decoder
    scale = config.train.seq_length / sum(typical.lengths)  # packs are full; typical samples may be many packs
    shared = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    tokens = config.train.seq_length / shared
    first = sum(stage.count(DECODER) for stage in layout.stages[:number])
    parts = dict.fromkeys(
        ("matrices", "experts", "attention", "memory", "tensor", "expert", "context", "pipeline"), 0.0
    )
    squares = scale * sum(n * n for n in typical.lengths) / shared
    recompute = config.recompute.decoder
    for layer in range(first, first + units.count(DECODER)):
        cost = layer_cost(decoder, layer)
        routed = 0
        if decoder.is_moe_layer(layer):
            routed = 6 * decoder.hidden_size * decoder.moe_intermediate_size * decoder.num_experts_per_tok
        parts["matrices"] += PASSES[recompute] * (cost.linear - routed) * tokens / rates.dense
        parts["experts"] += PASSES[recompute] * routed * tokens / rates.grouped
        parts["attention"] += ATTENTION_PASSES[recompute] * cost.squared * squares / rates.attention
        parts["memory"] += MEMORY_PASSES * BYTES * decoder.hidden_size * tokens / rates.memory
        for name, seconds in _layer_traffic(config, model, layer, tokens, rates).items():
            parts[name] += seconds
    if EMBEDDING in units:
        sharing = shared if parallel.vision == "images" else parallel.context_parallel_size
        cost = vision_cost(model.vision)
        linear, squared = cost.linear * sum(typical.patches), cost.squared * sum(n * n for n in typical.patches)
        passes = PASSES[config.recompute.vision]
        parts["vision"] = passes * scale * (linear / rates.dense + squared / rates.attention) / sharing
    if LOSS in units:
        parts["head"] = 3 * head_cost(decoder).linear * tokens / rates.dense
        parts["head"] += 24 * decoder.vocab_size * tokens / rates.memory  # float32 logits, read and written
    if layout.pipeline_size > 1:
        apart = parallel.data_parallel_size(GPUS_PER_NODE * layout.pipeline_size)  # stages lie on different nodes
        link = rates.between_nodes if apart else rates.in_node
        parts["pipeline"] = 2 * BYTES * decoder.hidden_size * tokens / link
    return parts


def _layer_traffic(config: RunConfig, model: GlmvConfig, layer: int, tokens: float, rates: Rates) -> dict[str, float]:
    """Return the seconds of a decoder layer's communication for a pack, forward and backward."""
    parallel, decoder = config.parallel, model.decoder
    tp, cp, ep = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
    )
    again = 1.5 if config.recompute.decoder == "full" else 1.0
    hidden = BYTES * decoder.hidden_size * tokens  # of this rank
    seconds = {}
    if tp > 1:  # gathered and scattered around attention and MLP; experts need none
        times = 4 if decoder.is_moe_layer(layer) else 8
        seconds["tensor"] = again * (times + 1) * hidden * (tp - 1) / rates.link(tp)
    if cp > 1:
        keys = 2 * BYTES * decoder.num_key_value_heads * decoder.head_dim * config.train.seq_length / tp / cp
        seconds["context"] = 0.5 * 3 * keys * (cp - 1) / rates.link(cp, tp)  # half is hidden behind attention
    if ep > 1 and decoder.is_moe_layer(layer):
        sent = 4 * again * hidden * decoder.num_experts_per_tok * (ep - 1) / ep
        seconds["expert"] = sent / rates.link(ep)
    return seconds


def _per_step(
    config: RunConfig, model: GlmvConfig, layout: PipelineLayout, processes: int, rates: Rates
) -> dict[str, float]:
    """Return the seconds that a step takes once: reduction of gradients, gathering of weights, update."""
    parallel = config.parallel
    gradient = 4 if config.optimizer.main_grads == "fp32" else 2
    per_stage = processes // parallel.pipeline_model_parallel_size
    reduced = updated = 0.0
    for held in parameters_by_rank(model, parallel, layout.stages):
        numbers = {expert: sum(n for group, n in held.items() if group.is_expert is expert) for expert in (False, True)}
        owners = _owners(parallel, per_stage)
        sent = sum((gradient + BYTES) * n * (1 - 1 / owners[expert]) for expert, n in numbers.items())
        reduced = max(reduced, sent / rates.between_nodes * (1 - rates.hidden))
        updated = max(updated, sum(28 * n / owners[expert] for expert, n in numbers.items()) / rates.memory)
    return {"data": reduced, "update": updated}


def _owners(parallel: ParallelConfig, per_stage: int) -> dict[bool, int]:
    """Return how many ranks share the state of an expert (True) and of any other parameter."""
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return {False: per_stage // parallel.tensor_model_parallel_size, True: per_stage // experts}


def calibrated(rates: Rates, measured: Sequence[float], predicted: StepTime, run: str) -> Rates:
    """Return rates with which a prediction equals the median of the steps that were measured.

    Args:
        rates: Those of the prediction.
        measured: Seconds of the run's steps.
        predicted: The prediction for that run.
        run: Its folder, for messages.

    Raises:
        ConfigError: There are too few steps.
    """
    if len(measured) <= WARM_UP:
        raise ConfigError(f"--calibrate {run}: {len(measured)} steps are too few; give a run of more than {WARM_UP}")
    return replace(rates, factor=rates.factor * statistics.median(measured[WARM_UP:]) / predicted.seconds)
