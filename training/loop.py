"""The training loop: fetch a step's packs, train on them, write the result down, save a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from common.files import write_text
from data_pipeline.encoding.batch import Batch
from model.checkpoint import TrainState, remove_unfinished
from model.fp8_scales import gather_scales
from training.batch_broadcast import read_step
from training.config import RunConfig
from training.distributed import check_processes, process_group
from training.errors import EXPECTED_ERRORS
from training.fallback import keep_damaged, settle_start_point
from training.garbage import garbage_collected_every
from training.guard import Guard, guarded
from training.hf_files import read_inherited, write_hf_files
from training.meter import Meter
from training.metrics import RunLog, logger, writes_to
from training.profiler import StepProfiler
from training.run_lock import agree_on_lock, run_lock
from training.run_state import (
    COMPLETE,
    EXIT_CODES,
    RUNNING,
    STOPPED,
    end_restart_of_an_ended_run,
    note_refusal,
    note_start,
    write_state,
)
from training.sample_list import gather_packs, write_samples
from training.saving import Saver
from training.setup import Prepared, build_trainer, prepare, resume
from training.start_point import (
    CHECKPOINTS,
    RUN_CONFIG,
    StartPoint,
    find_start_point,
)
from training.start_report import log_start
from training.step import StepReport
from training.step_errors import NonFiniteStep, NonFiniteWeights, NoSamples, NothingToLearn, Spike, StepError
from training.trackers import open_trackers
from training.validator import AfterStep, Validator
from training.watchdog import CLOSING


def run(config: RunConfig, kind: type[Run] | None = None) -> None:
    """Train as `config` says, from the start or from the newest checkpoint in `train.output_dir`.

    Args:
        config: the run.
        kind: what takes the steps, where a stage does more than to fetch packs and train on them.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: the configuration alone, or with the folders that it
            names, cannot work. Raised before any process group or file is touched.
        ConfigError: another run is writing into the same folder.
        SystemExit: 2, after an error of these kinds, or a step that is not finite, in the run itself; 75, if it was
            asked to stop; another code if a process hung or was lost.
    """
    folder, kind = Path(config.train.output_dir), kind or Run
    check_processes()
    end_restart_of_an_ended_run(folder)
    try:
        prepared = kind.prepare(config)
    except EXPECTED_ERRORS as error:
        note_refusal(folder, error)
        raise
    with run_lock(folder) as refusal:
        # Look again: until this run had the lock, another one may have been saving its last checkpoint.
        start_point = find_start_point(config)
        if not refusal:
            note_start(folder, config.train.steps)
        with process_group(config.health.collective_timeout):
            agree_on_lock(refusal)
            if dist.get_rank() == 0:
                remove_unfinished(folder / CHECKPOINTS)
            with guarded(config) as guard:
                exit_code = kind(prepared, settle_start_point(start_point, config, prepared.model), guard).train()
    if exit_code:
        raise SystemExit(exit_code)


class Run:
    """A run on one of its processes, from its start point to its last checkpoint.

    Args:
        prepared: the run's configuration, model and data.
        start_point: where its weights come from; the same on every process.
        guard: notes progress and requests to stop.
    """

    prepare: Callable[..., Prepared[Any]] = staticmethod(prepare)

    def __init__(self, prepared: Prepared[Any], start_point: StartPoint, guard: Guard) -> None:
        self.config, self.loader, self.guard = prepared.config, prepared.loader, guard
        self.folder = Path(self.config.train.output_dir)
        self.base = start_point.base
        guard.watchdog.mark(0, "loading", slow=True)  # the checksums had their own time
        self.trainer = build_trainer(prepared, start_point)
        self.meter = Meter(self.config, prepared.model, self.trainer)
        self.done = resume(prepared, self.trainer, self.meter, start_point.resume) if start_point.resume else 0
        self.started_at = self.done
        guard.watchdog.mark(self.done, "loading", slow=True)
        for loader in (self.loader, prepared.validation.loader):
            if loader is not None:
                guard.requests.on_request(loader.stop_waiting)
        self.hf_files = partial(
            write_hf_files,
            model=prepared.model,
            data=self.config.data,
            inherited=read_inherited(start_point.hf_files, prepared.model),
        )
        self.saver = Saver(self.config, self.trainer, self._state, self.hf_files, saved=self.done)
        guard.watchdog.is_saving = lambda: self.saver.is_busy
        self.profiler = StepProfiler(self.config.profile, self.folder, dist.get_rank())
        self.log: RunLog | None = None
        self.stopped_by = ""
        if dist.get_rank() == 0:
            keys = asdict(self.config)
            self.log = RunLog(self.folder, self.done, self.config.train.steps)
            with writes_to(self.folder / RUN_CONFIG):
                write_text(self.folder / RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(keys)))
            with writes_to(self.folder / CHECKPOINTS):
                keep_damaged(start_point)
            self.log.trackers = open_trackers(self.config.metrics, self.folder, self.done, keys)
            log_start(prepared, start_point, self.done, self.trainer.model_chunks[0].description)
        self.validator = self.build_validator(prepared)

    def build_validator(self, prepared: Prepared[Any]) -> AfterStep:
        """Return what validates the run, once all else is built. Collective."""
        tokenizer = self.loader.tokenizer
        return Validator(self.config, prepared.validation, tokenizer, self.log, self.done, self._may_validate)

    def read_packs(self, step: int) -> list[Batch] | None:
        """Return the packs of a step on this data-parallel rank; None where there are no more. Collective."""
        return read_step(self.loader) or None

    def train_on(self, step: int, batches: list[Batch]) -> StepReport:
        """Train on the packs of a step. Collective."""
        return self.trainer.run(step, batches)

    def quarantined(self, batches: list[Batch]) -> list[dict[str, Any]]:
        """Return the lines of quarantine.jsonl of a step. Collective."""
        return gather_quarantined(batches)

    def train(self) -> int:
        """Take the steps that are left, with checkpoints in between and at the end; return an exit code. Collective."""
        try:
            self._note_state(RUNNING)
            self._validate_if_due()  # what a stop has interrupted
            with garbage_collected_every(self.config.train.gc_interval) as garbage:
                while not self.stopped_by and self.done < self.config.train.steps and self._take_step():
                    self._validate_if_due()
                    self._save_if_due()
                    garbage.after_step(self.done)
            self._end()
            return self._finish()
        except Exception as error:
            self.guard.watchdog.mark(self.done, CLOSING, slow=True)  # the step that failed does not count
            self.guard.announce(error)  # before the wait for a save in the background, which may be long
            raise
        finally:
            self.guard.watchdog.mark(self.done, CLOSING, slow=True)
            self.saver.close()
            self.loader.close()
            self.profiler.close()
            if self.log is not None:
                self.log.close()

    def _take_step(self) -> bool:
        """Train on the next packs. Returns False where the data has ended, or the run was asked to stop."""
        with self.profiler.step(self.done + 1):
            return self._train_on_next_packs()

    def _train_on_next_packs(self) -> bool:
        started = time.perf_counter()
        step, is_first = self.done + 1, self.done == self.started_at
        self.guard.watchdog.mark(step, "data", slow=is_first)
        batches = self.read_packs(step)
        data_seconds = time.perf_counter() - started
        if self._is_stopped():
            self.loader.unread()
            return False
        if batches is None:
            if self.log is not None:
                logger.info("the data ends here: all sources have used up their epochs before step %d", step)
            return False
        self.guard.watchdog.mark(step, "step", slow=is_first)
        try:
            report = self.train_on(step, batches)
        except NonFiniteWeights:
            raise
        except (NonFiniteStep, Spike) as error:
            raise type(error)(f"{error}; {self._list_samples(step, error, batches)}") from None
        except (NoSamples, NothingToLearn) as error:
            self._count_samples(step, 0, self.quarantined(batches))
            if isinstance(error, NoSamples):
                raise
            raise NothingToLearn(f"{error}; {self._list_samples(step, error, batches)}") from None
        self.done = step
        seconds = time.perf_counter() - started
        measured = self.meter.measure(step, report, batches, data_seconds, seconds)
        if self.log is not None:
            self.log.step(step, report, seconds, measured)
        if report.bad is not None:
            self._note_bad_step(step, report, batches)
        self._count_samples(step, report.samples, self.quarantined(batches) if report.quarantined else [])
        return True

    def _is_stopped(self) -> bool:
        """Return whether the run was asked to stop, which all processes learn at the same step. Collective."""
        self.stopped_by = self.stopped_by or self.guard.requests.agree()
        return bool(self.stopped_by)

    def _finish(self) -> int:
        """Say how the run ended, write it down, and return its exit code."""
        if self.log is not None:
            self.guard.requests.remove_file()
            if self.stopped_by:
                outlook = (
                    "the same command resumes" if self.saver.saved == self.done else "nothing is saved, as configured"
                )
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

    def _note_bad_step(self, step: int, report: StepReport, batches: list[Batch]) -> None:
        """Write down the samples of a step that was skipped, or is worth a warning. Collective."""
        assert report.bad is not None
        facts: dict[str, Any] = {"reason": report.bad.reason, "action": report.bad.action}
        facts |= {"loss": report.loss, "grad_norm": report.grad_norm}
        file = write_samples(self.folder, step, facts, batches)
        if self.log is not None:
            self.log.bad_step(step, report.bad, file)

    def _list_samples(self, step: int, error: StepError, batches: list[Batch]) -> str:
        """Write down the samples of the step that ends the run, and return where. Collective."""
        facts = {"reason": str(error).removeprefix(f"step {step}: "), "action": "stop"}
        return f"its samples are listed in {write_samples(self.folder, step, facts, batches)}"

    def _may_validate(self) -> bool:
        """Note progress of a validation; return whether nobody asked the run to stop. Collective."""
        self.guard.watchdog.mark(self.done, "validating", slow=True)
        return not self._is_stopped()

    def _validate_if_due(self) -> None:
        self.guard.watchdog.mark(self.done, "validating", slow=True)
        self.validator.after_step(self.trainer, self.done, is_last=self.done == self.config.train.steps)

    def _end(self) -> None:
        """Validate where the data has ended, unless the run was asked to stop, and save the last step."""
        self.guard.watchdog.mark(self.done, "saving", slow=True)
        if not self.stopped_by:
            self.validator.after_step(self.trainer, self.done, is_last=True)
        self.saver.save_last(self.done)

    def _save_if_due(self) -> None:
        is_due = self.saver.is_due(self.done)
        self.guard.watchdog.mark(self.done, "saving", slow=is_due)
        self.saver.after_step(self.done)
        if is_due:
            self._note_state(RUNNING)

    def _state(self, step: int) -> TrainState:
        return TrainState(
            step=step,
            data=self.loader.state_dict(),
            config=asdict(self.config),
            updates=self.trainer.updates,
            bad_steps=self.trainer.bad_steps.state_dict(),
            metrics=self.meter.state(),
            base=self.base,
            fp8=gather_scales(self.trainer.model_chunks),
        )


def gather_quarantined(batches: list[Batch]) -> list[dict[str, Any]]:
    """Return the quarantined samples of the global batch, in the order of its packs, each once. Collective."""
    return [record for records in gather_packs([batch.quarantined for batch in batches]) for record in records]
