"""Shows what a run would do, without doing it: no process group, no device, no file.

    python -m pretrain.train --config FILE.yaml --dry-run --world-size 256

It reads the configuration, the index of the data and the header of the checkpoint, and builds the layout. It fails
where the run would fail at its start. Bytes per rank are those of weights, gradients and optimizer state, without
activations.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.urls import shown
from data_pipeline.plan.mixture_report import mixture_table, too_long_share
from model.checkpoint import STATE, is_checkpoint, read_train_state
from model.checkpoint_manifest import check_alone
from model.checkpoint_metadata import check_metadata
from model.config import ConfigError, GlmvConfig
from model.pipeline_layout import DECODER, EMBEDDING, LOSS, layout_for
from model.rank_sizes import Group, adapters_by_rank, parameters_by_rank
from model.weights.formats.opened import open_folder
from model.weights.load import check_names_and_shapes
from model.weights.remote import title
from model.weights.table import hf_shapes
from training.config import RunConfig
from training.dtypes import DTYPES
from training.fp8_checks import check_fp8, describe_fp8, fp8_warnings
from training.lora_base import check_lora
from training.ranks import rank
from training.run_data import RunData
from training.setup import Prepared, prepare
from training.start_point import StartPoint, find_start_point, with_positions
from training.start_report import settings_without_effect, warnings_of
from training.validation import describe_held_out

GIB = 2**30
# What a pack is taken to hold with --skip-files: samples of 2,048 tokens, half of them of images.
ASSUMED_SEGMENT, ASSUMED_IMAGE_PATCHES = 2048, 4096


@dataclass(frozen=True)
class RankBytes:
    """What a rank keeps for the whole run, in bytes."""

    weights: float
    gradients: float
    optimizer: float  # its share of the state, on the device

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def dry_run(
    config: RunConfig, processes: int | None, skip_files: bool, prepare: Callable[..., Prepared[Any]] = prepare
) -> None:
    """Print what a run would do; on the main process alone, if torchrun started several.

    Args:
        config: the run.
        processes: number of processes; by default WORLD_SIZE of the environment, or 1.
        skip_files: whether data, tokenizer and `model.init_from` are left unopened, as on a machine without them.
        prepare: of the stage.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: as for a real run.
    """
    assumed = processes is None and "WORLD_SIZE" not in os.environ
    processes = processes or _world_size()
    lines = _without_files(config, processes) if skip_files else _with_files(config, processes, prepare)
    try:
        text = "\n".join(lines)  # all of it, before anything is printed
    except ConfigError as error:
        if assumed and "process" in str(error):
            raise ConfigError(f"{error}; --world-size is not given, so 1 process is assumed") from None
        raise
    if rank() == 0:
        print(text, flush=True)


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text!r} in the environment is no number of processes; give --world-size")
    return int(text)


def _without_files(config: RunConfig, processes: int) -> Iterator[str]:
    if not config.model.preset:
        raise ConfigError("--skip-files needs model.preset: it does not open model.init_from to see which model it is")
    model = with_positions(GlmvConfig.from_preset(config.model.preset), config.model)
    config.check_layout(model, processes)
    check_fp8(config, model, here=False)
    check_lora(config, model)
    segments = max(config.train.seq_length // ASSUMED_SEGMENT, 1)
    image = [ASSUMED_IMAGE_PATCHES] * segments
    yield from _plan(config, model, processes, [min(ASSUMED_SEGMENT, config.train.seq_length)] * segments, image)
    init_from = shown(config.model.init_from) or "(none)"
    yield (
        f"\nnot opened (--skip-files): the data, its tokenizer and model.init_from={init_from}"
        ". So there is no mixture, and the pipeline table is for packs of which half the tokens are of images"
    )
    yield from (
        f"warning: {line}" for line in (*settings_without_effect(config, model), *fp8_warnings(config, here=False))
    )


def _with_files(config: RunConfig, processes: int, prepare: Callable[..., Prepared[Any]]) -> Iterator[str]:
    start_point = find_start_point(config)
    prepared = prepare(config, processes)
    model, loader = prepared.model, prepared.loader
    done = _check_start_point(start_point, model, loader, config)
    begins = title(start_point.folder) if start_point.folder else f"random weights, seed {config.train.seed}"
    yield f"start           step {done} of {config.train.steps:,}, from {begins}"
    yield from (*start_point.moved, *start_point.changed, *start_point.formats())
    yield from (f"warning: {path} is damaged and not used: {problem}" for path, problem in start_point.damaged)
    yield from _plan(config, model, processes, *loader.expected_work())
    mixture = loader.planned_mixture()
    yield f"\nthe next window of steps takes from every domain:\n{mixture_table(mixture)}" if mixture else ""
    yield from describe_held_out(prepared.held_out_sources, loader.sources)
    warnings = (*warnings_of(config, model, loader, too_long_share(mixture)), *prepared.warnings)
    yield from (f"warning: {line}" for line in warnings)


def _check_start_point(start_point: StartPoint, model: GlmvConfig, loader: RunData, config: RunConfig) -> int:
    """Check the header of what the run starts from, and return the steps that are taken already."""
    folder = start_point.folder
    if folder is not None and is_checkpoint(folder):
        check_metadata(folder / STATE)
        check_alone(folder, config.checkpoint.verify, only_small=False)
    elif folder is not None:
        check_names_and_shapes(open_folder(folder).source, hf_shapes(model))
    if start_point.resume is None:
        return 0
    state = read_train_state(Path(start_point.resume))
    loader.load_state_dict(state.data, allow_changes=config.checkpoint.allow_changes)
    return state.step


# --- what each rank holds ---------------------------------------------------------------------------------------------


def _plan(
    config: RunConfig, model: GlmvConfig, processes: int, segment_lengths: Sequence[int], image_patches: Sequence[int]
) -> Iterator[str]:
    """Yield the layout, what its ranks hold, and the pipeline table."""
    parallel = config.parallel
    replicas = parallel.data_parallel_size(processes)
    sizes = (parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size)
    layout = layout_for(model, *sizes, segment_lengths=segment_lengths, image_patches=image_patches)
    held = parameters_by_rank(model, parallel, layout.stages)
    adapters = adapters_by_rank(model, parallel, layout.stages, config.lora)
    whole = sum(sum(one.values()) for one in parameters_by_rank(model, type(parallel)(), one_stage(model)))
    yield f"model           {whole:,} parameters, {model.variant}"
    yield from describe_fp8(config, model, here=False)
    yield (
        f"layout          {processes} processes: TP {parallel.tensor_model_parallel_size} x "
        f"CP {parallel.context_parallel_size} x PP {sizes[0]} x DP {replicas}; experts: "
        f"EP {parallel.expert_model_parallel_size} x ETP {parallel.expert_tensor_parallel_size}"
    )
    yield f"packs           {config.describe_packs(replicas)}"
    without = "activations and FP8 copies of weights" if config.fp8.enabled else "activations"
    yield f"\nwhat a rank holds of each pipeline stage, without {without}; GiB, and parameters by part:"
    yield _table(list(_rank_rows(config, held, adapters, processes)))
    if layout.pipeline_size > 1:
        yield f"\npipeline layout:\n{layout.table()}"


def one_stage(model: GlmvConfig) -> list[list[str]]:
    """Return the units of a pipeline of one stage."""
    return [[EMBEDDING, *[DECODER] * model.decoder.num_hidden_layers, LOSS]]


def _rank_rows(
    config: RunConfig, held: Sequence[Counter[Group]], adapters: Sequence[Counter[Group]], processes: int
) -> Iterator[list[str]]:
    parts = [
        part for part in ("vision", "adapter", "decoder", "router") if any(g.part == part for h in held for g in h)
    ]
    yield ["pipeline rank", "weights", "gradients", "optimizer", "total", "parameters", *parts, "(experts)", "LoRA"]
    for number, (one, added) in enumerate(zip(held, adapters, strict=True)):
        sizes = rank_bytes(config, one, added, processes)
        counts = [sum(n for group, n in one.items() if group.part == part) for part in parts]
        experts = sum(n for group, n in one.items() if group.is_expert)
        gib = [f"{size / GIB:.2f}" for size in (sizes.weights, sizes.gradients, sizes.optimizer, sizes.total)]
        yield [str(number), *gib, *(f"{n:,}" for n in (sum(one.values()), *counts, experts, sum(added.values())))]


def rank_bytes(config: RunConfig, held: Counter[Group], adapters: Counter[Group], processes: int) -> RankBytes:
    """Return the bytes of weights, gradients and optimizer state on a rank's device.

    The state of a parameter is shared by the ranks that hold the same parameter: data and context parallelism repeat
    the dense ones; the experts are repeated over what expert parallelism leaves of a pipeline stage.

    Args:
        config: the run.
        held: parameters on the rank.
        adapters: parameters of its adapters (LoRA), which alone are trained where there are any.
        processes: number of processes.
    """
    parallel, optimizer, dtype = config.parallel, config.optimizer, DTYPES[config.train.precision]
    per_stage = processes // parallel.pipeline_model_parallel_size
    owners = {
        True: per_stage // (parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size),
        False: per_stage // parallel.tensor_model_parallel_size,
    }
    main_weight = 0 if config.train.precision == "fp32" else 4
    moments = DTYPES[optimizer.exp_avg_dtype].itemsize + DTYPES[optimizer.exp_avg_sq_dtype].itemsize
    state = (main_weight + moments) * (1 - optimizer.offload_fraction)
    trainable = adapters if config.lora.rank else held
    trained = {group: n for group, n in trainable.items() if not is_frozen(group, config.freeze)}
    return RankBytes(
        weights=(sum(held.values()) + sum(adapters.values())) * dtype.itemsize,
        gradients=sum(trained.values()) * DTYPES[optimizer.main_grads].itemsize,
        optimizer=sum(n * state / owners[group.is_expert] for group, n in trained.items()),
    )


def is_frozen(group: Group, freeze: Sequence[str]) -> bool:
    """Return whether `freeze` names a group's part; the routers are frozen with the decoder, too."""
    return group.part in freeze or (group.part == "router" and "decoder" in freeze)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
