"""The training loop: set up, then fetch, step, write down, save."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import OmegaConf

from data_pipeline.batch import Batch
from data_pipeline.loader import PackedLoader
from data_pipeline.tokens import GlmTokenizer
from model.checkpoint import (
    COMPANIONS,
    TrainState,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
    mark_latest,
    read_train_state,
    remove_old,
    save_checkpoint,
)
from model.config import ConfigError, GlmvConfig
from model.glmv import GlmvModel
from model.hf_weights import RandomWeights, SafetensorsFolder, load_weights
from model.parallel import initialize_model_parallel
from pretrain.companions import check_tokenizer, write_companions
from pretrain.config import RunConfig
from pretrain.distributed import process_group, rank, world_size
from pretrain.metrics import RunLog, logger
from pretrain.resume import checkpoint_to_resume
from pretrain.step import NonFiniteStep, TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(config: RunConfig) -> None:
    """Train as `config` says, from the start or from the newest checkpoint in `train.output_dir`.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: before any process group or file is touched, where the
            configuration alone, or with the folders that it names, cannot work.
        NonFiniteStep: the loss or the gradient stopped being a number.
    """
    start_from = weights_source(config)
    model_config = resolve_model(config, start_from)
    config.check_world(world_size())
    config.parallel.check(model_config, world_size(), config.train.seq_length)
    check_tokenizer(model_config, GlmTokenizer(config.data.tokenizer))
    resolved = asdict(config)
    checkpoint = checkpoint_to_resume(config, resolved)
    loader = PackedLoader(
        config.data,
        seq_length=config.train.seq_length,
        global_batch_size=config.train.global_batch_size,
        data_parallel_rank=config.parallel.data_parallel_rank(rank()),
        data_parallel_size=config.parallel.data_parallel_size(world_size()),
    )
    with process_group():
        _train(config, model_config, resolved, loader, start_from, checkpoint)


def weights_source(config: RunConfig) -> Path | None:
    """The folder that `model.init_from` means."""
    if not config.model.init_from:
        return None
    path = Path(config.model.init_from)
    if is_checkpoint(path):
        return find_checkpoint(path)
    if (path / "config.json").is_file():
        return path
    raise ConfigError(
        f"model.init_from={path} is neither a checkpoint, nor a run's folder with one, nor a Hugging Face folder"
    )


def resolve_model(config: RunConfig, start_from: Path | None) -> GlmvConfig:
    """The model that the preset and the folder to start from agree on."""
    preset = GlmvConfig.from_preset(config.model.preset) if config.model.preset else None
    if start_from is None:
        assert preset is not None
        return preset
    found = GlmvConfig.from_hf(start_from / COMPANIONS if (start_from / COMPANIONS).is_dir() else start_from)
    if preset is not None and preset != found:
        raise ConfigError(
            f"model.preset={config.model.preset} is another model than the one in model.init_from={start_from}; leave "
            "model.preset empty to take that one"
        )
    return found


def _train(
    config: RunConfig,
    model_config: GlmvConfig,
    resolved: dict[str, Any],
    loader: PackedLoader,
    start_from: Path | None,
    checkpoint: Path | None,
) -> None:
    train = config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    initialize_model_parallel(config.parallel, train.seed)
    assert parallel_state.get_data_parallel_rank() == config.parallel.data_parallel_rank(dist.get_rank())
    model = GlmvModel(
        model_config,
        config.parallel,
        dtype=DTYPES[train.precision],
        balance_loss_coeff=config.moe.balance_loss_coeff,
        expert_bias_update_rate=config.moe.expert_bias_update_rate,
    )
    if checkpoint is None:
        fill_weights(model, start_from, train.seed)
    trainer = TrainStep(model, config.optimizer, train.steps, train.seq_length)
    done = 0
    if checkpoint is not None:
        load_checkpoint(checkpoint, model, trainer.optimizer)
        state = read_train_state(checkpoint)
        loader.load_state_dict(state.data, allow_changes=config.checkpoint.allow_changes)
        done = state.step

    folder = Path(train.output_dir)
    log = None
    if dist.get_rank() == 0:
        log = RunLog(folder, done, train.steps)
        OmegaConf.save(OmegaConf.create(resolved), folder / "config.yaml")
        origin = checkpoint or start_from or f"random weights, seed {train.seed}"
        logger.info("step %d of %d, from %s, on %d processes", done, train.steps, origin, dist.get_world_size())
    companions = partial(write_companions, model=model_config, data=config.data, source=start_from)
    try:
        for step in range(done + 1, train.steps + 1):
            started = time.perf_counter()
            batches = loader.next_step()
            try:
                report = trainer.run(step, batches)
            except NonFiniteStep as error:
                name_the_samples(folder, step, batches)
                raise NonFiniteStep(
                    f"{error}; the samples are named in {folder}/nonfinite_step_{step}_rank_*.json"
                ) from None
            rejected = gather_rejected(batches) if report.rejected else []
            if log is not None:
                log.step(step, report, time.perf_counter() - started, rejected)
            if is_save_due(step, config):
                path = folder / "checkpoints" / f"step_{step:07d}"
                progress = TrainState(step=step, data=loader.state_dict(), config=resolved)
                save_checkpoint(path, model, companions=companions, optimizer=trainer.optimizer, train_state=progress)
                if dist.get_rank() == 0:
                    mark_latest(path)
                    remove_old(path.parent, config.checkpoint.keep_last)
                    logger.info("saved %s", path)
    finally:
        loader.close()
        if log is not None:
            log.close()


def fill_weights(model: GlmvModel, start_from: Path | None, seed: int) -> None:
    """Weights from a checkpoint, from a Hugging Face folder, or random: a function of the seed and of names alone."""
    if start_from is None:
        load_weights(model, RandomWeights(model.glmv_config, seed))
    elif is_checkpoint(start_from):
        load_checkpoint(start_from, model)
    else:
        load_weights(model, SafetensorsFolder(start_from))


def is_save_due(step: int, config: RunConfig) -> bool:
    """Every save_interval steps and at the end."""
    interval = config.checkpoint.save_interval
    return interval > 0 and (step % interval == 0 or step == config.train.steps)


def gather_rejected(batches: list[Batch]) -> list[dict[str, Any]]:
    """The quarantined samples of all ranks' packs, each once. Collective."""
    own = [record for batch in batches for record in batch.rejected]
    everyone: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(everyone, own, group=parallel_state.get_data_parallel_group())
    return [record for records in everyone for record in records]


def name_the_samples(folder: Path, step: int, batches: list[Batch]) -> None:
    """Write down which samples this rank had in a step that went wrong."""
    samples = [[sample for sample in batch.sample_ids if sample] for batch in batches]
    file = folder / f"nonfinite_step_{step}_rank_{dist.get_rank()}.json"
    file.write_text(json.dumps({"step": step, "packs": samples}, indent=1))
