"""The iterations of reinforcement learning, as steps of a run: what training.loop does around a step stays the same.

    draw prompts -> roll out -> score -> choose groups -> packs -> old log-probabilities -> updates -> observe

Everything up to the updates happens where another stage reads its packs. The curriculum takes in the rewards only once
the iteration has been trained on, so that a run that is stopped in between comes to the same prompts again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.encoding.batch import Batch
from data_pipeline.errors import Interrupted
from model.config import ConfigError
from rl.config import RlConfig
from rl.curriculum.rates import count_passes
from rl.engines.build import build_engine
from rl.errors import RolloutError
from rl.held_out import HeldOut
from rl.iteration import (
    PackMaker,
    check_answers,
    choose,
    counted,
    rollout_metrics,
    scores_of,
    split_updates,
    valid_share,
)
from rl.log_probs import log_probs_of, mismatch, with_old_log_probs
from rl.objective import LARGEST
from rl.policy_batch import PolicyBatch
from rl.rollout_manager import Group, RolledOut, RolloutManager
from rl.rollouts import Sampling
from rl.sampler import PromptSampler
from rl.scoring import FORMS, Scorer
from rl.setup import PreparedRl, prepare
from training.loop import Run
from training.loop import run as run_with
from training.metrics import logger
from training.optimizer import set_step
from training.pack_cost import pack_cost
from training.setup import Prepared
from training.step import StepReport
from training.validator import AfterStep

SUMS = ("tokens", "samples", "images", "patches", "quarantined")


def run(config: RlConfig) -> None:
    """Train as `config` says. Errors and exit codes are those of `training.loop.run`."""
    run_with(config, RlRun)


class RlRun(Run):
    """A run of reinforcement learning on one of its processes."""

    config: RlConfig
    prepare = staticmethod(prepare)

    def build_validator(self, prepared: Prepared[Any]) -> AfterStep:
        """Build what rolls out, and return what answers the held-out prompts. Collective."""
        assert isinstance(prepared, PreparedRl)
        config, model, tokenizer = self.config, prepared.model, prepared.loader.tokenizer
        self.sampler: PromptSampler = prepared.loader
        self._phase = "loading"
        scorer = Scorer(config.reward, FORMS[prepared.chat_form])
        check_judges(scorer)  # before servers start, which takes minutes
        self.engine = build_engine(config, model, tokenizer, prepared.chat_form, self.hf_files, self._waits)
        if self.log is not None and self.sampler.begins_again:
            logger.warning("the prompts are not those of the checkpoint: the curriculum begins again")
        for line in self.sampler.changed if self.log is not None else ():
            logger.warning(line)
        self.manager = RolloutManager(config, self.engine, scorer, tokenizer, self._mark, self._waits)
        self._held_out = prepared.held_out
        if self._held_out is not None:
            self.guard.requests.on_request(self._held_out.stop_waiting)
        self.pack_maker = PackMaker(config, tokenizer, pack_cost(model), model.image_token_id)
        limits = config.rollout
        self.sampling = Sampling(
            1.0, limits.max_thinking_tokens, limits.max_answer_tokens, limits.force_answer, limits.has_router_replay
        )
        self._rolled = RolledOut([], [], reused=False)
        self._updates: list[list[PolicyBatch]] = []
        self._metrics: dict[str, float] = {}
        return HeldOut(config, prepared.held_out, self.manager, self.log, self._may_validate)

    def train(self) -> int:
        """Take the iterations that are left; the engine and what scores end with them."""
        try:
            return super().train()
        finally:
            self.engine.close()
            self.manager.scorer.close()
            if self._held_out is not None:
                self._held_out.close()

    def _mark(self, phase: str) -> None:
        self._phase = phase
        self.guard.watchdog.mark(self.done + 1, phase, slow=True)

    def _waits(self) -> None:
        """Note that rollouts are still drawn or scored, here or elsewhere.

        Raises:
            Interrupted: the run was asked to stop.
        """
        self._mark(self._phase)
        if self.guard.requests.is_known:
            raise Interrupted("the run was asked to stop")

    # --- before the updates -------------------------------------------------------------------------------------------

    def read_packs(self, step: int) -> list[Batch]:
        """Roll out the prompts of an iteration, and return the packs of all its updates. Collective.

        Where the run is asked to stop there are none: training.loop looks for that next.
        """
        started = time.perf_counter()
        self._rolled, self._updates = RolledOut([], [], reused=False), []  # the memory of the last iteration
        if self._is_stopped():
            return []
        rows = self.sampler.draw(step)
        tiers = self.sampler.tiers(rows)
        try:
            self._rolled = self.manager.roll_out(
                self.trainer,
                self.sampler.table,
                rows,
                step,
                version=step - 1,
                sampling=self.sampling,
                group=self.config.rl.group,
                kept=True,
            )
        except Interrupted:
            return []
        if self._is_stopped():
            return []
        groups = self._rolled.groups
        check_answers(groups, step)
        rolled_out = time.perf_counter()
        chosen, counts = choose(groups, self.config)
        of_row = dict(zip(rows.tolist(), tiers, strict=True))
        self._metrics = {
            **rollout_metrics(groups, [of_row[group.row] for group in groups]),
            **counts,
            **self.sampler.report(),
            "rollout/reused": float(self._rolled.reused),
            "seconds/rollout": rolled_out - started,
        }
        self._mark("log-probabilities")
        seed = (self.config.data.seed, step)
        self._updates = [
            self._with_old_log_probs(self.pack_maker.packs(update, (*seed, number)))
            for number, update in enumerate(split_updates(chosen, self.config.rl.updates, seed))
        ]
        packs = [pack for update in self._updates for pack in update]
        self._metrics |= self._compare(step, packs)
        self._metrics["seconds/log_probs"] = time.perf_counter() - rolled_out
        return list(packs)

    def _with_old_log_probs(self, packs: list[PolicyBatch]) -> list[PolicyBatch]:
        limit = self.config.rollout.tis
        log_probs = log_probs_of(self.trainer, packs)
        return [with_old_log_probs(pack, values, limit) for pack, values in zip(packs, log_probs, strict=True)]

    def _compare(self, step: int, packs: list[PolicyBatch]) -> dict[str, float]:
        """Return how far the engine is from the policy.

        Raises:
            RolloutError: farther than the run allows.
        """
        if not packs:
            return {}
        found, limit = mismatch(packs, self.config.rollout.tis), self.config.rollout.max_mismatch
        if limit and not found.mean <= limit:  # or not a number
            raise RolloutError(
                f"step {step}: the engine's log-probabilities differ from the policy's by {found.mean:.3g} on average, "
                f"more than rollout.max_mismatch={limit:g}: it does not have the policy's weights, images or tokens; "
                "look at the engine's log, or raise the limit if its precision explains it"
            )
        return found.metrics()

    # --- the updates --------------------------------------------------------------------------------------------------

    def train_on(self, step: int, batches: list[Batch]) -> StepReport:
        """Take the updates of an iteration, and let the curriculum know its rewards. Collective."""
        reports = []
        for update in self._updates:
            self.guard.watchdog.mark(step, "step", slow=self.done == self.started_at)
            reports.append(self.trainer.run(step, update))
        self._observe(self._rolled.groups)
        report = joined(reports) if reports else self._nothing_learned(step)
        report.quarantined = len(self._rolled.unused)
        report.metrics |= {**self._metrics, "updates": len(reports)}
        return report

    def _nothing_learned(self, step: int) -> StepReport:
        """Return the report of an iteration in which no group has differences: there is nothing to learn from."""
        if self.log is not None:
            reasons = Counter(verdict.reason for group in self._rolled.groups for verdict in group.verdicts)
            why = f"all rollouts of every prompt got the same reward ({counted(reasons)})"
            none = f"none of its {len(self._rolled.unused)} prompts could be used; see quarantine.jsonl"
            logger.warning("step %d: %s; nothing was updated", step, why if reasons else none)
        lr = set_step(self.trainer.scheduler, step)
        return StepReport(0.0, 0.0, lr, tokens=0, padding_fraction=0.0, samples=0, images=0, patches=0, quarantined=0)

    def quarantined(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Return the lines of quarantine.jsonl of an iteration: prompts that could not be read or answered."""
        return self._rolled.unused

    def _count_samples(self, step: int, samples: int, quarantined: list[dict[str, Any]]) -> None:
        """Count prompts: the samples of a step are rollouts, of which a prompt has several or none."""
        super()._count_samples(step, len(self._rolled.groups), quarantined)

    def _observe(self, groups: list[Group]) -> None:
        size = self.config.rl.group
        rows = np.array([group.row for group in groups], np.int64)
        passes = count_passes(scores_of(groups, size), self.config.curriculum.pass_score)
        self.sampler.observe(rows, passes, np.full(len(rows), float(size)), valid_share(groups, size))


def check_judges(scorer: Scorer) -> None:
    """Check on the main process, which scores, that the judges answer; name those that are down. Collective.

    Raises:
        ConfigError: one refuses to. Raised on all processes.
    """
    problem: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            for line in scorer.check_judges():
                logger.warning("%s; until it does, its fallback is the reward of what it is asked", line)
        except ConfigError as error:
            problem = [error]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]


def joined(reports: Sequence[StepReport]) -> StepReport:
    """Return one report of several updates: sums of what they took, means of what they computed."""
    sums = {name: sum(getattr(report, name) for report in reports) for name in SUMS}
    useful = sum(report.tokens for report in reports)
    laid_out = sum(report.tokens / (1 - report.padding_fraction) for report in reports)
    names = reports[0].metrics
    metrics = {
        name: (max if name == LARGEST else fmean)([report.metrics[name] for report in reports]) for name in names
    }
    part_norms = {name: fmean(report.part_norms[name] for report in reports) for name in reports[0].part_norms}
    return replace(
        reports[-1],
        **sums,
        loss=fmean(report.loss for report in reports),
        grad_norm=fmean(report.grad_norm for report in reports),
        padding_fraction=1 - useful / laid_out,
        bad=next((report.bad for report in reports if report.bad), None),
        part_norms=part_norms,
        metrics=metrics,
    )
