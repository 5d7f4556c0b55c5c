"""The training loop: set up, then fetch, step, write down, save."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import OmegaConf

from common.files import write_json, write_text
from data_pipeline.encoding.batch import Batch
from data_pipeline.loading.loader import PackedLoader
from data_pipeline.plan.mixture_report import mixture_table, too_long_share
from model.backend import select_backend
from model.checkpoint import (
    TrainState,
    is_checkpoint,
    load_checkpoint,
    mark_latest,
    read_train_state,
    remove_old,
    save_checkpoint,
)
from model.config import GlmvConfig
from model.glmv import GlmvModel, build_model_chunks
from model.hf_weights import RandomWeights, SafetensorsFolder, load_weights
from model.parallel import initialize_model_parallel
from model.parts import freeze
from model.pipeline_layout import PipelineLayout, layout_for
from training.batch_broadcast import broadcast_batches, is_lead
from training.config import PRECISIONS, RunConfig
from training.distributed import process_group, rank, world_size
from training.errors import expected_errors
from training.hf_files import check_tokenizer, read_inherited, write_hf_files
from training.metrics import RunLog, logger
from training.pack_cost import pack_cost
from training.run_lock import agree_on_lock, run_lock
from training.start_point import RUN_CONFIG, StartPoint, agree_on_start_point, find_start_point, resolve_model
from training.step import NonFiniteStep, TrainStep

SET_ASIDE = 0.02  # of all samples, for their length: more is worth a warning


def run(config: RunConfig) -> None:
    """Train as `config` says, from the start or from the newest checkpoint in `train.output_dir`.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: before any process group or file is touched, where the
            configuration alone, or with the folders that it names, cannot work.
        ConfigError: another run is writing into the same folder.
        SystemExit: 2, after an error of these kinds, or a step that is not finite, in the run itself.
    """
    resolved = asdict(config)
    origin = find_start_point(config, resolved)
    model_config = resolve_model(config.model.preset, origin)
    config.parallel.check(model_config, world_size(), config.train.seq_length, config.data.segment_multiple)
    config.check_world(world_size())
    loader = PackedLoader(
        config.data,
        seq_length=config.train.seq_length,
        global_batch_size=config.train.global_batch_size,
        cost=pack_cost(model_config),
        data_parallel_rank=config.parallel.data_parallel_rank(rank(), world_size()),
        data_parallel_size=config.parallel.data_parallel_size(world_size()),
    )
    check_tokenizer(model_config, loader.tokenizer)
    layout = lay_out_pipeline(config, model_config, loader)
    with run_lock(Path(config.train.output_dir)) as refusal:
        origin = find_start_point(
            config, resolved
        )  # again: until now, another run may have been saving its last checkpoint
        with process_group():
            agree_on_lock(refusal)
            with expected_errors(on_every_process=True):
                _train(config, model_config, resolved, loader, layout, agree_on_start_point(origin))


def lay_out_pipeline(config: RunConfig, model: GlmvConfig, loader: PackedLoader) -> PipelineLayout | None:
    """What each pipeline stage holds, so that none waits for another on packs such as this run's."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return None
    sizes = (parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size)
    segment_lengths, image_patches = loader.expected_work()
    return layout_for(model, *sizes, segment_lengths=segment_lengths, image_patches=image_patches)


def _train(
    config: RunConfig,
    model_config: GlmvConfig,
    resolved: dict[str, Any],
    loader: PackedLoader,
    layout: PipelineLayout | None,
    origin: StartPoint,
) -> None:
    train = config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    initialize_model_parallel(config.parallel, train.seed)
    assert parallel_state.get_data_parallel_rank() == config.parallel.data_parallel_rank(rank(), world_size())
    model_chunks = build_model_chunks(
        model_config,
        config.parallel,
        pipeline_layout=layout and layout.stages,
        dtype=PRECISIONS[train.precision],
        balance_loss_coeff=config.balancing.balance_loss_coeff,
        expert_bias_update_rate=config.balancing.expert_bias_update_rate,
        recompute=config.recompute,
        backend=select_backend(config.model.backend, PRECISIONS[train.precision]),
    )
    for chunk in model_chunks:
        freeze(chunk, config.freeze)
    if origin.resume is None:
        fill_weights(model_chunks, origin.weights, train.seed)
    trainer = TrainStep(model_chunks, config.optimizer, train.steps, train.seq_length, train.check_determinism)
    done = 0
    if origin.resume is not None:
        load_checkpoint(origin.resume, model_chunks, trainer.optimizer)
        state = read_train_state(origin.resume)
        loader.load_state_dict(state.data, allow_changes=config.checkpoint.allow_changes)
        done = state.step

    folder = Path(train.output_dir)
    log = None
    if dist.get_rank() == 0:
        log = RunLog(folder, done, train.steps)
        write_text(folder / RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved)))
        start = origin.folder or f"random weights, seed {train.seed}"
        logger.info("step %d of %d, from %s, on %d processes", done, train.steps, start, dist.get_world_size())
        if layout is not None:
            logger.info("pipeline layout:\n%s", layout.table())
        if mixture := loader.planned_mixture():
            logger.info("the next window of steps takes from every domain:\n%s", mixture_table(mixture))
            if (share := too_long_share(mixture)) > SET_ASIDE:
                logger.warning(
                    "%.0f%% of these samples are longer than train.seq_length=%d and set aside: raise it, lower "
                    "data.image_max_tokens or data.video_max_tokens, or set data.too_long",
                    *(100 * share, train.seq_length),
                )
        logger.info("backend: %s", model_chunks[0].backend.description)
        if done == train.steps:
            logger.info("nothing is left to do; raise train.steps to go on")
    hf_files = partial(write_hf_files, model=model_config, data=config.data, inherited=read_inherited(origin.hf_files))
    saved = done

    def save() -> None:
        path = folder / "checkpoints" / f"step_{done:07d}"
        progress = TrainState(step=done, data=loader.state_dict(), config=resolved)
        trainer.synchronize_weights()
        save_checkpoint(path, model_chunks, hf_files=hf_files, optimizer=trainer.optimizer, train_state=progress)
        if dist.get_rank() == 0:
            mark_latest(path)
            remove_old(path, config.checkpoint.keep_last)
            logger.info("saved %s", path)

    try:
        for step in range(done + 1, train.steps + 1):
            started = time.perf_counter()
            batches = broadcast_batches(loader.next_step)
            if not batches:
                if log is not None:
                    logger.info("the data ends here: all sources have used up their epochs before step %d", step)
                break
            try:
                report = trainer.run(step, batches)
            except NonFiniteStep as error:
                if is_lead():
                    name_the_samples(folder, step, batches)
                raise NonFiniteStep(
                    f"{error}; the samples are named in {folder}/nonfinite_step_{step}_rank_*.json"
                ) from None
            done = step
            quarantined = gather_quarantined(batches) if report.quarantined else []
            if log is not None:
                log.step(step, report, time.perf_counter() - started, quarantined)
            loader.tally.add(report.samples, quarantined)
            loader.tally.check(config.data.max_quarantined_fraction, str(folder / "quarantine.jsonl"))
            if config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0:
                save()
                saved = step
        if config.checkpoint.save_interval and done > saved:  # the last step, of the run or of the data
            save()
    finally:
        loader.close()
        if log is not None:
            log.close()


def fill_weights(model_chunks: Sequence[GlmvModel], start_from: Path | None, seed: int) -> None:
    """Weights from a checkpoint, from a Hugging Face folder, or random: a function of the seed and of names alone."""
    if start_from is None:
        load_weights(model_chunks, RandomWeights(model_chunks[0].glmv_config, seed))
    elif is_checkpoint(start_from):
        load_checkpoint(start_from, model_chunks)
    else:
        load_weights(model_chunks, SafetensorsFolder(start_from))


def gather_quarantined(batches: list[Batch]) -> list[dict[str, Any]]:
    """The quarantined samples of the global batch, in the order of its packs, each once. Collective."""
    own = [batch.quarantined for batch in batches]
    everyone: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(everyone, own, group=parallel_state.get_data_parallel_group())
    # Rank r of n has packs r, r+n, r+2n ...: the first of every rank come first.
    return [record for packs in zip(*everyone, strict=True) for records in packs for record in records]


def name_the_samples(folder: Path, step: int, batches: list[Batch]) -> None:
    """Write down which samples this data-parallel rank had in a step that went wrong."""
    samples = [[sample for sample in batch.sample_ids if sample] for batch in batches]
    write_json(folder / f"nonfinite_step_{step}_rank_{dist.get_rank()}.json", {"step": step, "packs": samples})
