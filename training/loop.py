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
from training.errors import EXPECTED_ERRORS
from training.fallback import set_aside_damaged, settle_start_point
from training.guard import Guard, guarded
from training.hf_files import read_inherited, write_hf_files
from training.metrics import RunLog, logger, writes_to
from training.run_lock import agree_on_lock, run_lock
from training.run_state import (
    COMPLETE,
    EXIT_CODES,
    RUNNING,
    STOPPED,
    end_restart_of_an_ended_run,
    note_refusal,
    write_state,
)
from training.setup import Prepared, build_trainer, prepare, resume
from training.start_point import (
    CHECKPOINTS,
    RUN_CONFIG,
    StartPoint,
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
        SystemExit: 2, after an error of these kinds, or a step that is not finite, in the run itself; 75, if it was
            asked to stop; another code if a process hung or was lost.
    """
    folder = Path(config.train.output_dir)
    end_restart_of_an_ended_run(folder)
    try:
        prepared = prepare(config)
    except EXPECTED_ERRORS as error:
        note_refusal(folder, error)
        raise
    with run_lock(folder) as refusal:
        # Look again: until this run had the lock, another one may have been saving its last checkpoint.
        start_point = find_start_point(config)
        with process_group(config.health.collective_timeout):
            agree_on_lock(refusal)
            if dist.get_rank() == 0:
                remove_unfinished(folder / CHECKPOINTS)
            with guarded(config) as guard:
                exit_code = Run(prepared, settle_start_point(start_point, config, prepared.model), guard).train()
    if exit_code:
        raise SystemExit(exit_code)


class Run:
    """A run on one of its processes, from its start point to its last checkpoint.

    Args:
        prepared: the run's configuration, model and data.
        start_point: where its weights come from; the same on every process.
        guard: notes progress and requests to stop.
    """

    def __init__(self, prepared: Prepared, start_point: StartPoint, guard: Guard) -> None:
        self.config, self.loader, self.guard = prepared.config, prepared.loader, guard
        self.folder = Path(self.config.train.output_dir)
        self.trainer = build_trainer(prepared, start_point)
        self.done = resume(prepared, self.trainer, start_point.resume) if start_point.resume else 0
        self.saved = self.started_at = self.done
        self._write_hf_files = partial(
            write_hf_files,
            model=prepared.model,
            data=self.config.data,
            inherited=read_inherited(start_point.hf_files, prepared.model),
        )
        self.log: RunLog | None = None
        self.stopped_by = ""
        guard.requests.forget_old_file()
        if dist.get_rank() == 0:
            self.log = RunLog(self.folder, self.done, self.config.train.steps)
            with writes_to(self.folder / RUN_CONFIG):
                write_text(self.folder / RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(asdict(self.config))))
            with writes_to(self.folder / CHECKPOINTS):
                set_aside_damaged(start_point)
            log_start(prepared, start_point, self.done, self.trainer.model_chunks[0].backend.description)

    def train(self) -> int:
        """Take the steps that are left, with checkpoints in between and at the end; return an exit code. Collective."""
        interval = self.config.checkpoint.save_interval
        try:
            self._note_state(RUNNING)
            while self.done < self.config.train.steps and not self._is_stopped() and self._take_step():
                if interval and self.done % interval == 0:
                    self._save()
            if interval and self.done > self.saved:  # the last step, of the run or of the data
                self._save()
            return self._finish()
        finally:
            self.guard.watchdog.mark(self.done, "closing", slow=True)
            self.loader.close()
            if self.log is not None:
                self.log.close()

    def _take_step(self) -> bool:
        """Train on the next packs. Returns False where the data has ended."""
        started = time.perf_counter()
        step, is_first = self.done + 1, self.done == self.started_at
        self.guard.watchdog.mark(step, "data", slow=is_first)
        batches = broadcast_batches(self.loader.next_step)
        if not batches:
            if self.log is not None:
                logger.info("the data ends here: all sources have used up their epochs before step %d", step)
            return False
        self.guard.watchdog.mark(step, "step", slow=is_first)
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

    def _is_stopped(self) -> bool:
        """Return whether the run was asked to stop, which all processes learn before the same step. Collective."""
        self.stopped_by = self.guard.requests.agree()
        return bool(self.stopped_by)

    def _finish(self) -> int:
        """Say how the run ended, write it down, and return its exit code."""
        if self.log is not None:
            self.guard.requests.remove_file()
            if self.stopped_by:
                outlook = "the same command resumes" if self.saved == self.done else "nothing is saved, as configured"
                logger.info("stopped at step %d by %s; %s", self.done, self.stopped_by, outlook)
        return self._note_state(STOPPED if self.stopped_by else COMPLETE)

    def _note_state(self, state: str) -> int:
        if self.log is not None:
            reason = self.stopped_by and f"by {self.stopped_by}"
            write_state(self.folder, state, self.done, self.config.train.steps, reason)
        return EXIT_CODES.get(state, 0)

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
        self.guard.watchdog.mark(self.done, "saving", slow=True)
        path = self.folder / CHECKPOINTS / f"step_{self.done:07d}"
        state = TrainState(step=self.done, data=self.loader.state_dict(), config=asdict(self.config))
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
        self._note_state(RUNNING)


def gather_quarantined(batches: list[Batch]) -> list[dict[str, Any]]:
    """Return the quarantined samples of the global batch, in the order of its packs, each once. Collective."""
    own = [batch.quarantined for batch in batches]
    everyone: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(everyone, own, group=parallel_state.get_data_parallel_group())
    # Rank r of n has packs r, r+n, r+2n ...: the first of every rank come first.
    return [record for packs in zip(*everyone, strict=True) for records in packs for record in records]
