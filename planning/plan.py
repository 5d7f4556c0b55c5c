"""A plan: what every pipeline stage of a run needs, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

from data_pipeline.loading.loader import PackedLoader
from model.config import ConfigError, GlmvConfig
from model.flops import vision_cost
from model.image_assignment import assign_images
from model.pipeline_layout import DECODER, PipelineLayout, layout_for
from model.rank_sizes import adapters_by_rank, parameters_by_rank
from planning.kernels import FusedKernelsOnPaper
from planning.limits import Limits
from planning.packs import PackShape, pack_full_of_images, packs_per_rank, segments_of, typical_pack
from planning.rank_trace import RankTrace, Traced, on_device, representative_ranks, trace_rank
from planning.rollouts import Rollouts
from training.config import RunConfig
from training.dry_run import RankBytes, one_stage, rank_bytes
from training.dtypes import DTYPES
from training.lora_base import check_lora
from training.setup import prepare
from training.start_point import with_positions

STATE_BYTES = 12  # of a trained parameter in a checkpoint: float32 weight and two moments


@dataclass(frozen=True)
class Workload:
    """The model and the packs of a run.

    Of reinforcement learning they are those that an update is expected to take, and `train.global_batch_size` of this
    configuration says how many.
    """

    config: RunConfig
    model: GlmvConfig
    fullest: PackShape  # the pack with the most patches, for which memory must suffice
    typical: PackShape  # by which layers are divided over pipeline stages
    source: str  # where the packs come from
    rollouts: Rollouts | None = None  # of reinforcement learning


def read_workload(config: RunConfig, processes: int, skip_files: bool) -> Workload:
    """Return the packs of a run: those that its data gives first, or assumed ones.

    Args:
        config: The run.
        processes: Number of GPUs.
        skip_files: Do not open data, tokenizer and `model.init_from`.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: As for a real run.
    """
    length = config.train.seq_length
    if not skip_files:
        prepared = prepare(config, processes)
        shapes = planned_packs(prepared.loader)
        lengths, patches = prepared.loader.expected_work()
        typical = PackShape(tuple(lengths), (tuple(patches), *[()] * (len(lengths) - 1)))
        prepared.loader.close()
        source = f"the fullest of the first {len(shapes)} packs of the run's data"
        return Workload(config, prepared.model, max(shapes, key=lambda shape: sum(shape.patches)), typical, source)
    model = model_of_preset(config)
    fullest = pack_full_of_images(length, config.data.image_max_tokens, config.data.segment_multiple)
    return Workload(config, model, fullest, typical_pack(length), "assumed: as many image tokens as a pack can hold")


def model_of_preset(config: RunConfig) -> GlmvConfig:
    """Return the model of a run without opening a file.

    Raises:
        ConfigError: The configuration names no preset.
    """
    if not config.model.preset:
        raise ConfigError("--skip-files needs model.preset: it does not open model.init_from to see which model it is")
    return with_positions(GlmvConfig.from_preset(config.model.preset), config.model)


def planned_packs(loader: PackedLoader) -> list[PackShape]:
    """Return the packs that the data gives first."""
    return [segments_of(pack) for pack in loader.expected_packs()]


@dataclass(frozen=True)
class StagePlan:
    """What the fullest rank of a pipeline stage needs."""

    trace: RankTrace
    optimizer: float  # bytes of its share of the optimizer state
    kept: float  # bytes that modules keep from the step before
    rollouts: Rollouts | None = None  # of reinforcement learning

    @property
    def weights(self) -> float:
        """Bytes of the model's weights."""
        return self.trace.weights

    @property
    def gradients(self) -> float:
        """Bytes of the gradients."""
        return self.trace.gradients

    @property
    def engine(self) -> float:
        """Bytes of the embedded engine's model, which the leads have: they are in the first stage."""
        return self.rollouts.resident if self.rollouts is not None and not self.trace.pipeline_rank else 0.0

    @property
    def activations(self) -> float:
        """Bytes that live beside weights, gradients, optimizer and engine, at most."""
        other = self.rollouts.between_updates(not self.trace.pipeline_rank) if self.rollouts is not None else 0.0
        return self.kept + max(self.trace.activations, self.trace.update, self.trace.log_probs, other)

    @property
    def tensors(self) -> float:
        """Bytes of tensors at the peak."""
        return self.weights + self.gradients + self.optimizer + self.engine + self.activations


@dataclass(frozen=True)
class Plan:
    """What a run needs on some number of GPUs."""

    workload: Workload
    processes: int
    limits: Limits
    layout: PipelineLayout
    stages: list[StagePlan]

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.tensors)

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return self.limits.fits(self.worst.tensors)

    @property
    def packs_per_rank(self) -> int:
        """Packs of a step, or of an update of reinforcement learning, on each data-parallel rank."""
        return packs_per_rank(self.workload.config, self.processes)

    @property
    def bubble(self) -> float:
        """Share of a step in which a pipeline rank waits for others to fill and drain the pipeline."""
        parallel = self.workload.config.parallel
        waiting = (parallel.pipeline_model_parallel_size - 1) / parallel.virtual_pipeline_model_parallel_size
        return waiting / (self.packs_per_rank + waiting)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        model, parallel = self.workload.model, type(self.workload.config.parallel)()
        return sum(sum(one.values()) for one in parameters_by_rank(model, parallel, one_stage(model)))

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: weights, and what the optimizer keeps of trained parameters."""
        config = self.workload.config
        trained = sum(
            sum(one.values())
            for one in adapters_by_rank(
                self.workload.model, type(config.parallel)(), one_stage(self.workload.model), config.lora
            )
        )
        trained = trained if config.lora.rank else self.parameters
        return self.parameters * DTYPES[config.train.precision].itemsize + trained * STATE_BYTES


def traced_of(workload: Workload, processes: int, limits: Limits) -> tuple[Traced, PipelineLayout]:
    """Return what the ranks of a layout have in common, and the layout.

    Raises:
        ConfigError: The layout is impossible on this number of GPUs.
    """
    config, parallel = workload.config, workload.config.parallel
    config.check_layout(workload.model, processes)
    check_lora(config, workload.model)
    layout = layout_for(
        workload.model,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        segment_lengths=workload.typical.lengths,
        image_patches=workload.typical.patches,
    )
    stages = layout.stages if layout.pipeline_size > 1 else None
    backend = FusedKernelsOnPaper()
    fullest = workload.fullest.within(config.train.seq_length, config.data.segment_multiple)
    has_rollouts = workload.rollouts is not None
    traced = Traced(
        config, workload.model, processes, stages, fullest, backend, limits.imbalance, log_probs=has_rollouts
    )
    return traced, layout


def make_plan(
    workload: Workload,
    processes: int,
    limits: Limits,
    *,
    stages: Sequence[int] | None = None,
    until_too_big: bool = False,
) -> Plan:
    """Build the ranks of a run on paper and let each take a step.

    Args:
        workload: The run.
        processes: Number of GPUs.
        limits: The memory of a GPU.
        stages: Pipeline ranks to build, each by its fullest rank; by default all.
        until_too_big: Build none after one that does not fit.

    Raises:
        ConfigError: The layout is impossible on this number of GPUs.
    """
    traced, layout = traced_of(workload, processes, limits)
    ranks = _fullest_ranks(workload, processes)
    # The optimizer on paper has float32 moments on the device, whatever the run has.
    on_paper = replace(workload, config=replace(workload.config, optimizer=on_device(workload.config.optimizer)))
    static, traced_static = (static_bytes(one, processes, layout) for one in (workload, on_paper))
    planned = []
    for stage in range(len(ranks)) if stages is None else stages:
        trace = trace_rank(traced, ranks[stage], quick=True)
        kept = max(trace.optimizer - traced_static[stage].optimizer, 0)
        planned.append(StagePlan(trace, static[stage].optimizer, kept, workload.rollouts))
        if until_too_big and not limits.fits(planned[-1].tensors):
            break
    return Plan(workload, processes, limits, layout, planned)


def different_stages(layout: PipelineLayout, model: GlmvConfig) -> list[int]:
    """Return the pipeline ranks that need all that any needs: of those that hold the same, the first.

    The first has the most packs in flight.
    """
    layer = count()
    kinds = [
        [f"layer, experts: {model.decoder.is_moe_layer(next(layer))}" if unit == DECODER else unit for unit in units]
        for units in layout.stages
    ]
    first: dict[str, int] = {}
    for rank in range(layout.pipeline_size):
        first.setdefault(str(kinds[rank :: layout.pipeline_size]), rank)
    return list(first.values())


def static_bytes(workload: Workload, processes: int, layout: PipelineLayout) -> list[RankBytes]:
    """Return the bytes that a rank of each pipeline stage keeps from step to step."""
    config, model = workload.config, workload.model
    held = parameters_by_rank(model, config.parallel, layout.stages)
    adapters = adapters_by_rank(model, config.parallel, layout.stages, config.lora)
    return [rank_bytes(config, *one, processes) for one in zip(held, adapters, strict=True)]


def _fullest_ranks(workload: Workload, processes: int) -> list[int]:
    """Return one rank of every pipeline stage; of the first stage the one with the most patches."""
    parallel = workload.config.parallel
    ranks = representative_ranks(parallel, processes)
    if parallel.vision == "images":
        group = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        patches = workload.fullest.patches
        shares = assign_images([vision_cost(workload.model.vision).of(n) for n in patches], group)
        loads = [sum(patches[image] for image in images) for images in shares]
        ranks[0] = loads.index(max(loads))
    return ranks
