"""Validation in reinforcement learning: greedy answers to held-out prompts, scored as rollouts are.

RUN/validation.jsonl     {"step": 8, "validation/reward": 0.62, "validation/accuracy": 0.6, ...}
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from rl.config import RlConfig
from rl.prompts import PromptTable
from rl.rollouts import Sampling
from rl.rolls import Rolls
from training.metrics import VALIDATION, RunLog, finite_or_null, logger, writes_to
from training.step import TrainStep
from training.validator import last_step


class HeldOut:
    """Answers held-out prompts when that is due. Collective.

    Args:
        config: of the run.
        table: the held-out prompts; None: there are none.
        rolls: draws and scores rollouts.
        log: of the run; None except on the main process.
        may_continue: called before a validation, on all processes.
    """

    def __init__(
        self,
        config: RlConfig,
        table: PromptTable | None,
        rolls: Rolls,
        log: RunLog | None,
        may_continue: Callable[[], bool],
    ) -> None:
        self.config, self.table, self.rolls, self.log = config, table, rolls, log
        self.may_continue = may_continue
        self.file = Path(config.train.output_dir) / VALIDATION
        # The first validation is that of the model which the run starts from.
        last: list[Any] = [last_step(self.file, default=-1) if log is not None else 0]
        dist.broadcast_object_list(last, src=0)
        self._validated = last[0]
        limits = config.rollout
        self.sampling = Sampling(0.0, limits.max_thinking_tokens, limits.max_answer_tokens, limits.force_answer)

    def after_step(self, trainer: TrainStep, step: int, *, is_last: bool = False) -> None:
        """Validate after `step` if that is due, by interval or at the end, and not done yet."""
        interval = self.config.validation.interval
        is_due = interval and (is_last or step % interval == 0)
        if self.table is None or not is_due or self._validated >= step or not self.may_continue():
            return
        started = time.perf_counter()
        rows = np.arange(len(self.table))
        groups = self.rolls.roll_out(
            trainer, self.table, rows, step, version=step, sampling=self.sampling, group=1
        ).groups
        self._validated = step
        if self.log is None:
            return
        scores = defaultdict(list)
        for group in groups:
            scores[group.record.source].append(group.scores[0])
        every = [score for of_source in scores.values() for score in of_source]
        pass_score = self.config.curriculum.pass_score
        line = {
            "step": step,
            "validation/reward": float(np.mean(every)),
            "validation/accuracy": float(np.mean([score >= pass_score for score in every])),
            **{f"validation/reward/{source}": float(np.mean(values)) for source, values in sorted(scores.items())},
            "validation/samples": len(every),
            "validation/seconds": time.perf_counter() - started,
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
