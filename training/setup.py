"""From a configuration to what a run needs: the model's configuration, the loader, the layout, then the model itself.

`prepare` runs before the processes join, so that a mistake ends the run in seconds and touches nothing; `build_trainer`
runs after that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from megatron.core import parallel_state

from data_pipeline.loading.loader import PackedLoader
from data_pipeline.loading.source import Source
from model.checkpoint import is_checkpoint, load_checkpoint, read_train_state
from model.config import GlmvConfig
from model.dispatch import check_dispatch_kernels
from model.fp8_scales import load_scales
from model.glmv import GlmvModel, build_model_chunks
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.lora_weights import RandomAdapters, fill_adapters
from model.parts import freeze
from model.pipeline_layout import PipelineLayout, layout_for
from model.process_groups import initialize_model_parallel
from model.weights.formats.opened import open_folder
from model.weights.load import RandomWeights, load_weights
from training.config import RunConfig
from training.dtypes import DTYPES
from training.fp8_checks import check_fp8
from training.hf_files import check_tokenizer, read_inherited
from training.lora_base import check_lora
from training.meter import Meter
from training.objective import Objective
from training.pack_cost import pack_cost
from training.ranks import rank, world_size
from training.run_data import RunData
from training.start_point import StartPoint, find_start_point, resolve_model
from training.step import TrainStep
from training.validator import PreparedValidation, prepare_validation

Data = TypeVar("Data", bound=RunData)


@dataclass
class Prepared(Generic[Data]):
    """What is known of a run before its processes join."""

    config: RunConfig
    model: GlmvConfig
    loader: Data
    layout: PipelineLayout | None  # the layers of each pipeline stage; None without pipeline parallelism
    validation: PreparedValidation
    objective: Objective | None = None  # what its steps minimise; None: the cross-entropy
    warnings: Sequence[str] = ()  # of its stage, beside those of start_report.warnings_of

    @property
    def held_out_sources(self) -> Sequence[Source]:
        """The sources that the run validates on."""
        return self.validation.loader.sources if self.validation.loader is not None else []


def prepare(config: RunConfig, processes: int | None = None) -> Prepared[PackedLoader]:
    """Check all that can be checked in one process, and open the data. Writes nothing.

    Args:
        config: the run.
        processes: number of processes of a run on other machines, whose devices cannot be checked; None: the run is
            here, on the processes that torchrun started.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: the configuration cannot work, by itself or with the
            folders that it names.
    """
    start_point, model = check_run(config, processes)
    processes = processes or world_size()
    data_parallel_rank = config.parallel.data_parallel_rank(rank(), processes)
    data_parallel_size = config.parallel.data_parallel_size(processes)
    loader = build_loader(config, model, data_parallel_rank, data_parallel_size)
    check_tokenizer(model, loader.tokenizer, start_point.hf_files)
    validation = prepare_validation(config, model, loader, data_parallel_rank, data_parallel_size)
    return Prepared(config, model, loader, lay_out_pipeline(config, model, loader), validation)


def check_run(config: RunConfig, processes: int | None = None) -> tuple[StartPoint, GlmvConfig]:
    """Check all but the data, and return where the run starts and what it trains.

    Args:
        config: the run.
        processes: as for `prepare`.

    Raises:
        ConfigError, CheckpointError, WeightsError: as for `prepare`.
    """
    start_point = find_start_point(config)
    if processes is None:
        config.optimizer.check_machine()
    here, processes = processes is None, processes or world_size()
    model = resolve_model(config.model, start_point)
    read_inherited(start_point.hf_files, model)  # a damaged or unsuitable file is an error now, not at the first save
    config.check_layout(model, processes)
    check_fp8(config, model, here=here)
    if here:
        check_dispatch_kernels(config.moe.dispatcher)
    check_lora(config, model)
    return start_point, model


def build_loader(
    config: RunConfig, model: GlmvConfig, data_parallel_rank: int = 0, data_parallel_size: int = 1
) -> PackedLoader:
    """Build the loader of a run's packs.

    Args:
        config: the run.
        model: what it trains; this decides the cost of a pack, and so which samples share one.
        data_parallel_rank: which packs of each step to load: packs r, r + n, r + 2n ... for rank r of n.
        data_parallel_size: number of ranks that share the packs of a step. One rank gets all of them.

    Raises:
        DataError: a source, an index or the tokenizer cannot be used.
    """
    return PackedLoader(
        config.data,
        seq_length=config.train.seq_length,
        global_batch_size=config.train.global_batch_size,
        cost=pack_cost(model),
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )


def lay_out_pipeline(config: RunConfig, model: GlmvConfig, loader: RunData) -> PipelineLayout | None:
    """Choose the layers of each pipeline stage, so that none waits for another on packs such as this run's."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return None
    sizes = (parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size)
    segment_lengths, image_patches = loader.expected_work()
    return layout_for(model, *sizes, segment_lengths=segment_lengths, image_patches=image_patches)


# --- after the processes have joined ----------------------------------------------------------------------------------


def build_trainer(prepared: Prepared[Any], start_point: StartPoint) -> TrainStep:
    """Build the model and its optimizer, with weights, in the layout of the run. Collective.

    Where `start_point` is a checkpoint to resume, it still has to be loaded: see `resume`.
    """
    config, train = prepared.config, prepared.config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    initialize_model_parallel(config.parallel, train.seed)
    assert parallel_state.get_data_parallel_rank() == config.parallel.data_parallel_rank(rank(), world_size())
    model_chunks = build_model_chunks(
        prepared.model,
        config.parallel,
        pipeline_layout=prepared.layout and prepared.layout.stages,
        dtype=DTYPES[train.precision],
        balance_loss_coeff=config.moe_in_effect.balance_loss_coeff,
        expert_bias_update_rate=config.moe_in_effect.expert_bias_update_rate,
        dispatcher=config.moe.dispatcher,
        shared_expert_overlap=config.moe.shared_expert_overlap,
        recompute=config.recompute,
        fp8=config.fp8,
        backend=config.select_backend(),
    )
    if (start_point.resume is None and not start_point.with_optimizer) or config.lora.rank:
        fill_weights(model_chunks, start_point.weights, train.seed, config.checkpoint.verify)
    if config.lora.rank:
        add_new_adapters(model_chunks, config.lora, train.seed)
    for chunk in model_chunks:
        freeze(chunk, config.freeze)
    trainer = TrainStep(
        model_chunks,
        config.optimizer,
        train.steps,
        train.seq_length,
        train.check_determinism,
        config.health,
        prepared.objective,
    )
    if start_point.with_optimizer and start_point.weights is not None:
        load_checkpoint(start_point.weights, trainer.model_chunks, trainer.optimizer, config.checkpoint.verify)
        trainer.updates = read_train_state(start_point.weights).updates_done
    return trainer


def fill_weights(model_chunks: Sequence[GlmvModel], weights: Path | None, seed: int, verify: str) -> None:
    """Fill the model from a checkpoint, from a Hugging Face folder, or at random. Collective.

    Args:
        model_chunks: what this rank holds of the model.
        weights: the checkpoint or folder; None for random weights.
        seed: of random weights, which are a function of it and of the parameters' names alone.
        verify: how a checkpoint is compared with its manifest.
    """
    if weights is None:
        load_weights(model_chunks, RandomWeights(model_chunks[0].glmv_config, seed))
    elif is_checkpoint(weights):
        load_checkpoint(weights, model_chunks, verify=verify)
    else:
        load_weights(model_chunks, open_folder(weights).source)


def add_new_adapters(model_chunks: Sequence[GlmvModel], lora: LoraConfig, seed: int) -> None:
    """Add new adapters to a model that is filled, and freeze the rest of it."""
    for chunk in model_chunks:
        add_adapters(chunk, lora, seed=seed)
    fill_adapters(model_chunks, RandomAdapters(model_chunks[0].glmv_config, lora, seed))


def resume(prepared: Prepared[Any], trainer: TrainStep, meter: Meter, checkpoint: Path) -> int:
    """Load a checkpoint into model, optimizer, loader and meter, and return its step. Collective.

    Raises:
        CheckpointError: it is damaged or of another model.
        DataError: the data is not what it was, and `checkpoint.allow_changes` is false.
    """
    policy = prepared.config.checkpoint
    # Its checksums have been compared: see training.fallback.
    load_checkpoint(checkpoint, trainer.model_chunks, trainer.optimizer, verify="sizes")
    state = read_train_state(checkpoint)
    prepared.loader.load_state_dict(state.data, allow_changes=policy.allow_changes)
    trainer.updates = state.updates_done
    trainer.bad_steps.load_state_dict(state.bad_steps)
    meter.load_state(state.metrics)
    load_scales(trainer.model_chunks, state.fp8)
    return state.step
