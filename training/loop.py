"""The training loop: fetch a step's packs, train on them, write the result down, save a checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import OmegaConf

from common.files import write_json, write_text
from data_pipeline.encoding.batch import Batch
from model.checkpoint import TrainState, remove_old, remove_unfinished, save_checkpoint
from training.batch_broadcast import broadcast_batches, is_lead
from training.config import RunConfig
from training.distributed import process_group
from training.errors import expected_errors
from training.hf_files import read_inherited, write_hf_files
from training.metrics import RunLog, logger, writes_to
from training.run_lock import agree_on_lock, run_lock
from training.setup import Prepared, build_trainer, prepare, resume
from training.start_point import (
    CHECKPOINTS,
    RUN_CONFIG,
    StartPoint,
    agree_on_start_point,
    announce_first_save,
    find_start_point,
    make_latest,
)
from training.start_report import log_start
from training.step import NonFiniteStep, NonFiniteWeights, NoSamples, NothingToLearn


def run(config: RunConfig) -> None:
    """Train as `config` says, from the start or from the newest checkpoint in `train.output_dir`.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: the configuration alone, or with the folders that it
            names, cannot work. Raised before any process group or file is touched.
        ConfigError: another run is writing into the same folder.
        SystemExit: 2, after an error of these kinds, or a step that is not finite, in the run itself.
    """
    prepared = prepare(config)
    with run_lock(Path(config.train.output_dir)) as refusal:
        # Look again: until this run had the lock, another one may have been saving its last checkpoint.
        start_point = find_start_point(config)
        with process_group():
            agree_on_lock(refusal)
            if dist.get_rank() == 0:
                remove_unfinished(Path(config.train.output_dir) / CHECKPOINTS)
            with expected_errors(on_every_process=True):
                Run(prepared, agree_on_start_point(start_point)).train()


class Run:
    """A run on one of its processes, from its start point to its last checkpoint.

    Args:
        prepared: the run's configuration, model and data.
        start_point: where its weights come from; the same on every process.
    """

    def __init__(self, prepared: Prepared, start_point: StartPoint) -> None:
        self.config, self.loader = prepared.config, prepared.loader
        self.folder = Path(self.config.train.output_dir)
        self.base = start_point.base
        self.trainer = build_trainer(prepared, start_point)
        self.done = resume(prepared, self.trainer, start_point.resume) if start_point.resume else 0
        self.saved = self.done
        self._write_hf_files = partial(
            write_hf_files,
            model=prepared.model,
            data=self.config.data,
            inherited=read_inherited(start_point.hf_files, prepared.model),
        )
        self.log: RunLog | None = None
        if dist.get_rank() == 0:
            self.log = RunLog(self.folder, self.done, self.config.train.steps)
            with writes_to(self.folder / RUN_CONFIG):
                write_text(self.folder / RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(asdict(self.config))))
            log_start(prepared, start_point, self.done, self.trainer.model_chunks[0].backend.description)

    def train(self) -> None:
        """Take the steps that are left, with checkpoints in between and at the end. Collective."""
        interval = self.config.checkpoint.save_interval
        try:
            while self.done < self.config.train.steps and self._take_step():
                if interval and self.done % interval == 0:
                    self._save()
            if interval and self.done > self.saved:  # the last step, of the run or of the data
                self._save()
        finally:
            self.loader.close()
            if self.log is not None:
                self.log.close()

    def _take_step(self) -> bool:
        """Train on the next packs. Returns False where the data has ended."""
        started = time.perf_counter()
        step = self.done + 1
        batches = broadcast_batches(self.loader.next_step)
        if not batches:
            if self.log is not None:
                logger.info("the data ends here: all sources have used up their epochs before step %d", step)
            return False
        try:
            report = self.trainer.run(step, batches)
        except NonFiniteWeights:
            raise
        except NonFiniteStep as error:
            raise NonFiniteStep(f"{error}; {self._list_samples('nonfinite', step, batches)}") from None
        except (NoSamples, NothingToLearn) as error:
            self._count_samples(step, 0, gather_quarantined(batches))
            if isinstance(error, NoSamples):
                raise
            raise NothingToLearn(f"{error}; {self._list_samples('nothing_to_learn', step, batches)}") from None
        self.done = step
        if self.log is not None:
            self.log.step(step, report, time.perf_counter() - started)
        self._count_samples(step, report.samples, gather_quarantined(batches) if report.quarantined else [])
        return True

    def _count_samples(self, step: int, samples: int, quarantined: list[dict[str, Any]]) -> None:
        """Count the samples of a step, write down the quarantined ones, and stop the run if these are too many."""
        if self.log is not None:
            self.log.quarantined(step, quarantined)
        self.loader.tally.add(samples, quarantined)
        self.loader.tally.check(self.config.data.max_quarantined_fraction, str(self.folder / "quarantine.jsonl"))

    def _list_samples(self, kind: str, step: int, batches: list[Batch]) -> str:
        """Write the names of a failed step's samples into files, one per data-parallel rank, and return where."""
        if is_lead():
            samples = [[sample for sample in batch.sample_ids if sample] for batch in batches]
            file = self.folder / f"{kind}_step_{step}_rank_{dist.get_rank()}.json"
            with writes_to(file):
                write_json(file, {"step": step, "packs": samples})
        return f"its samples are listed in {self.folder}/{kind}_step_{step}_rank_*.json"

    def _save(self) -> None:
        """Write a checkpoint and make it the latest. Collective."""
        path = self.folder / CHECKPOINTS / f"step_{self.done:07d}"
        state = TrainState(step=self.done, data=self.loader.state_dict(), config=asdict(self.config), base=self.base)
        if dist.get_rank() == 0:
            with writes_to(path.parent):
                announce_first_save(path)
        self.trainer.synchronize_weights()
        save_checkpoint(
            path,
            self.trainer.model_chunks,
            hf_files=self._write_hf_files,
            optimizer=self.trainer.optimizer,
            train_state=state,
        )
        if dist.get_rank() == 0:
            with writes_to(path.parent):
                make_latest(path)
                remove_old(path, self.config.checkpoint.keep_last)
            logger.info("saved %s", path)
        self.saved = self.done


def gather_quarantined(batches: list[Batch]) -> list[dict[str, Any]]:
    """Return the quarantined samples of the global batch, in the order of its packs, each once. Collective."""
    own = [batch.quarantined for batch in batches]
    everyone: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(everyone, own, group=parallel_state.get_data_parallel_group())
    # Rank r of n has packs r, r+n, r+2n ...: the first of every rank come first.
    return [record for packs in zip(*everyone, strict=True) for records in packs for record in records]
