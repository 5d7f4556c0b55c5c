"""What a run does beside training: validate when it is due, and show answers to prompts.

RUN/validation.jsonl               {"step": 100, "validation/loss": 2.1, "validation/loss/ocr": 2.4, ...}
RUN/samples/step_0000100.html      the page of answers; beside it the same as JSON
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.loading.loader import PackedLoader
from data_pipeline.media.pixel_budget import PixelBudget
from model.config import GlmvConfig
from training.config import RunConfig
from training.metrics import VALIDATION, RunLog, finite_or_null, logger, writes_to
from training.pack_cost import pack_cost
from training.prompts import Prompt, chat_form_of, encode_prompt, read_prompts
from training.ranks import rank
from training.samples import answer
from training.samples_page import SAMPLES, last_page, write_samples
from training.step import TrainStep
from training.validation import build_held_out_loader, check_loss_tokens, check_overlap, held_out_loss


@dataclass
class PreparedValidation:
    """The held-out packs and the prompts of a run; none where the run does not ask for them."""

    loader: PackedLoader | None
    prompts: list[Prompt]


def prepare_validation(
    config: RunConfig, model: GlmvConfig, training: PackedLoader, data_parallel_rank: int, data_parallel_size: int
) -> PreparedValidation:
    """Open the held-out shards and the prompts' files, and check both. Writes nothing.

    Args:
        config: the run.
        model: what it trains.
        training: its loader.
        data_parallel_rank: of this process.
        data_parallel_size: of the run.

    Raises:
        ConfigError, DataError: a source or a prompt cannot be used.
    """
    options = config.validation
    loader = None
    if options.interval:
        seq_length, global_batch_size = config.train.seq_length, config.train.global_batch_size
        cost = pack_cost(model)
        loader = build_held_out_loader(
            options,
            config.data,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            cost=cost,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            micro_batch_multiple=config.parallel.micro_batch_multiple,
        )
        check_overlap(loader.sources, training.sources, allowed=options.allow_overlap)
        if rank() == 0:
            check_loss_tokens(
                options, config.data, seq_length=seq_length, global_batch_size=global_batch_size, cost=cost
            )
    prompts = []
    if options.samples_interval:
        budget = PixelBudget(config.data.image_max_tokens, config.data.video_max_tokens)
        form = chat_form_of(model.variant, training.tokenizer)
        max_length = config.train.seq_length - options.samples_max_tokens
        prompts = [
            encode_prompt(prompt, training.tokenizer, budget, form, max_length)
            for prompt in read_prompts(options.samples, options.samples_file)
        ]
    return PreparedValidation(loader, prompts)


class AfterStep(Protocol):
    """What a run does beside training."""

    def after_step(self, trainer: TrainStep, step: int, *, is_last: bool = False) -> None:
        """Do what is due after a step. Collective."""


class Validator:
    """Validates a run and shows answers when they are due. Collective where it does so.

    Args:
        config: the run.
        prepared: its held-out packs and prompts.
        tokenizer: of the run.
        log: of the run; None except on the main process.
        done: the step that the run starts after.
        may_continue: called again and again while it works, on all processes. Where it says no, because the run was
            asked to stop, the validation is given up.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: PreparedValidation,
        tokenizer: GlmTokenizer,
        log: RunLog | None,
        done: int,
        may_continue: Callable[[], bool],
    ) -> None:
        self.may_continue = may_continue
        self.config, self.prepared, self.tokenizer, self.log = config, prepared, tokenizer, log
        self.options, self.folder = config.validation, Path(config.train.output_dir)
        # The steps after which that was done last. A run that was stopped meanwhile has no line, or page, of its step.
        last = [0, 0]
        if log is not None:
            last = [last_step(self.folder / VALIDATION), last_page(self.folder / SAMPLES, done)]
        dist.broadcast_object_list(last, src=0)
        self._validated, self._shown = last

    def after_step(self, trainer: TrainStep, step: int, *, is_last: bool = False) -> None:
        """Validate and show answers after `step` if they are due, by interval or at the end, and not done yet."""
        loader = self.prepared.loader
        if loader is not None and self._validated < step and (is_last or step % self.options.interval == 0):
            self._validate(trainer, step, loader)
            self._validated = step
        if self.prepared.prompts and self._shown < step and (is_last or step % self.options.samples_interval == 0):
            self._show(trainer, step)
            self._shown = step

    def _validate(self, trainer: TrainStep, step: int, loader: PackedLoader) -> None:
        started = time.perf_counter()
        result = held_out_loss(trainer, loader, self.options.steps, self.may_continue)
        seconds = time.perf_counter() - started
        if self.log is None:
            return
        if result is None:
            logger.info("the validation at step %d is given up, because the run was asked to stop", step)
            return
        line = {
            "step": step,
            "validation/loss": result.loss,
            **{f"validation/loss/{domain}": loss for domain, loss in result.domain_losses.items()},
            "validation/tokens": result.tokens,
            "validation/samples": result.samples,
            "validation/seconds": seconds,
        }
        with writes_to(self.folder / VALIDATION):
            with (self.folder / VALIDATION).open("a") as file:
                print(json.dumps({key: finite_or_null(value) for key, value in line.items()}), file=file)
            self.log.scalars(step, line)
        logger.info(
            "validation at step %d  loss %.4f  %s samples  %.1f s", step, result.loss, f"{result.samples:,}", seconds
        )
        if result.unused:
            logger.warning("validation: %d held-out samples could not be used", result.unused)

    def _show(self, trainer: TrainStep, step: int) -> None:
        started = time.perf_counter()
        answers = answer(
            trainer,
            self.prepared.prompts,
            self.tokenizer,
            max_tokens=self.options.samples_max_tokens,
            segment_multiple=self.config.data.segment_multiple,
            may_continue=self.may_continue,
        )
        seconds = time.perf_counter() - started
        if self.log is None:
            return
        if answers is None:
            logger.info("the answers at step %d are given up, because the run was asked to stop", step)
            return
        page = write_samples(
            self.folder / SAMPLES, step, self.prepared.prompts, answers, self.tokenizer, self.log.tensorboard
        )
        logger.info("answers at step %d: %s  %.1f s", step, page, seconds)


def last_step(file: Path, default: int = 0) -> int:
    """Return the step of the last line of validation.jsonl; `default` where there is none."""
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else default
