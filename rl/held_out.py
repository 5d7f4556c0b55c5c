"""Validation in reinforcement learning: greedy answers to held-out prompts, scored as rollouts are.

As many prompts as an iteration may draw are read and answered together, so that memory does not grow with their number.

RUN/validation.jsonl     {"step": 8, "validation/reward": 0.62, "validation/accuracy": 0.6, ...}
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.errors import DataError, Interrupted
from rl.config import RlConfig
from rl.iteration import counted
from rl.prompts import PromptTable
from rl.rollout_manager import ENGINE_FAILED, RolloutManager
from rl.rollouts import Sampling
from training.metrics import VALIDATION, RunLog, finite_or_null, logger, writes_to
from training.step import TrainStep
from training.validator import last_step


class HeldOut:
    """Answers held-out prompts when that is due. Collective.

    Args:
        config: of the run.
        table: the held-out prompts; None: there are none.
        manager: draws and scores rollouts.
        log: of the run; None except on the main process.
        may_continue: called again and again while it works, on all processes. Where it says no, because the run was
            asked to stop, the validation is given up.
    """

    def __init__(
        self,
        config: RlConfig,
        table: PromptTable | None,
        manager: RolloutManager,
        log: RunLog | None,
        may_continue: Callable[[], bool],
    ) -> None:
        self.config, self.table, self.manager, self.log = config, table, manager, log
        self.may_continue = may_continue
        self.file = Path(config.train.output_dir) / VALIDATION
        # The first validation is that of the model which the run starts from.
        last: list[Any] = [last_step(self.file, default=-1) if log is not None else 0]
        dist.broadcast_object_list(last, src=0)
        self._validated = last[0]
        drawn = config.expansion.max_ratio if config.expansion.enabled else 1
        self._together = math.ceil(config.rl.prompts * drawn)
        limits = config.rollout
        self.sampling = Sampling(0.0, limits.max_thinking_tokens, limits.max_answer_tokens, limits.force_answer)

    def after_step(self, trainer: TrainStep, step: int, *, is_last: bool = False) -> None:
        """Validate after `step` if that is due, by interval or at the end, and not done yet."""
        interval = self.config.validation.interval
        is_due = interval and (is_last or step % interval == 0)
        if self.table is None or not is_due or self._validated >= step:
            return
        started = time.perf_counter()
        scores, unused = self._scores(trainer, self.table, step)
        self._validated = step
        if self.log is None:
            return
        if scores is None:
            logger.info("the validation at step %d is given up, because the run was asked to stop", step)
            return
        self._write(step, scores, time.perf_counter() - started)
        if unused:
            logger.warning("validation: %s", _describe(unused))

    def _scores(
        self, trainer: TrainStep, table: PromptTable, step: int
    ) -> tuple[dict[str, list[float]] | None, list[dict[str, Any]]]:
        """Return the scores of the answers by data source, and the prompts that could not be used. Collective.

        No scores: the run was asked to stop.

        Raises:
            DataError: no prompt can be read.
        """
        scores = defaultdict[str, list[float]](list)
        unused: list[dict[str, Any]] = []
        for first in range(0, len(table), self._together):
            if not self.may_continue():
                return None, unused
            rows = np.arange(first, min(first + self._together, len(table)))
            try:
                rolled = self.manager.roll_out(
                    trainer, table, rows, step, version=step, sampling=self.sampling, group=1
                )
            except Interrupted:
                self.may_continue()  # the processes agree on who asked the run to stop
                return None, unused
            unused += rolled.unused
            for group in rolled.groups:
                scores[group.record.source].append(group.scores[0])
        if not scores and all(line["reason"] != ENGINE_FAILED for line in unused):
            raise DataError(f"validation.sources: {_describe(unused)}, and there are no others: copy the shards again")
        return scores, unused

    def _write(self, step: int, scores: Mapping[str, Sequence[float]], seconds: float) -> None:
        """Write a line of validation.jsonl, and log it."""
        assert self.log is not None
        every = [score for of_source in scores.values() for score in of_source]
        pass_score = self.config.curriculum.pass_score
        line = {
            "step": step,
            "validation/reward": mean(every),
            "validation/accuracy": mean([score >= pass_score for score in every]),
            **{f"validation/reward/{source}": mean(values) for source, values in sorted(scores.items())},
            "validation/samples": len(every),
            "validation/seconds": seconds,
        }
        with writes_to(self.file):
            with self.file.open("a") as file:
                print(json.dumps({key: finite_or_null(value) for key, value in line.items()}), file=file)
            self.log.scalars(step, line)
        logger.info(
            "validation at step %d  reward %.3f  accuracy %.1f%%  %d prompts  %.1f s",
            step,
            line["validation/reward"],
            100 * line["validation/accuracy"],
            len(every),
            line["validation/seconds"],
        )


def _describe(unused: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with prompts that could not be used."""
    reasons = Counter(line["reason"] for line in unused)
    first = unused[0]
    return (
        f"{len(unused):,} held-out prompts could not be used ({counted(reasons)}), such as {first['shard']}/"
        f"{first['key']} ({first['detail']})"
    )


def mean(values: Sequence[float]) -> float:
    """Return the mean; nan of nothing."""
    return fmean(values) if values else math.nan
