"""Rolling out: prompts are read, an engine answers them, the answers are scored, and all of it is kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.encoding.tokenizer import GlmTokenizer
from rewards.verdict import Verdict
from rl.config import RlConfig
from rl.engines.engine import Engine
from rl.prompts import PromptTable
from rl.reading import Prompt, read_prompts, unused_prompt
from rl.rollout_folder import RolloutFolder, spans
from rl.rollouts import (
    Request,
    Rollout,
    RolloutPrompt,
    RolloutsHead,
    Sampling,
    fingerprint,
    seed_of,
)
from rl.scoring import ResponseToScore, Scorer
from rl.waiting import patient_group, work_together
from training.determinism import weights_checksum
from training.metrics import logger
from training.samples import decode
from training.step import TrainStep

ENGINE_FAILED = "engine_failed"  # why a prompt is quarantined that the engine could not answer


@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt, scored.

    Attributes:
        row: of the prompt in its table.
        prompt: only the lead of the processes that share packs has its patches and files.
        record: reference, verifier and where the prompt comes from.
        rollouts: in the order of their numbers.
        verdicts: one for each.
    """

    row: int
    prompt: RolloutPrompt
    record: RlRecord
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def scores(self) -> list[float]:
        """The score of each rollout."""
        return [verdict.score for verdict in self.verdicts]


@dataclass(frozen=True)
class RolledOut:
    """What rolling out gave; the same on every process, but for the prompts' patches."""

    groups: list[Group]
    unused: list[dict[str, Any]]  # lines of quarantine.jsonl: prompts that could not be read
    reused: bool  # whether the rollouts were found on disk


class RolloutManager:
    """Draws and scores rollouts. Collective, as is making one.

    Args:
        config: of the run.
        engine: draws.
        scorer: scores, on the main process.
        tokenizer: of the run.
        mark: called with what begins: "data", "rollout", "reward".
        on_wait: called again and again until it ends; raises Interrupted where the run is asked to stop.
    """

    def __init__(
        self,
        config: RlConfig,
        engine: Engine,
        scorer: Scorer,
        tokenizer: GlmTokenizer,
        mark: Callable[[str], None],
        on_wait: Callable[[], None],
    ) -> None:
        self.config, self.engine, self.scorer, self.tokenizer, self.mark = config, engine, scorer, tokenizer, mark
        self.on_wait, self.folder = on_wait, RolloutFolder(config, scorer, tokenizer)
        self._published = -1
        self._group = patient_group()

    def roll_out(
        self,
        trainer: TrainStep,
        table: PromptTable,
        rows: np.ndarray,
        iteration: int,
        *,
        version: int,
        sampling: Sampling,
        group: int,
        kept: bool = False,
    ) -> RolledOut:
        """Draw and score a group of rollouts of each prompt.

        Args:
            trainer: the policy.
            table: the prompts.
            rows: int64 [prompts], of the table.
            iteration: it decides the seeds.
            version: of the weights that the trainer has.
            sampling: how responses are drawn.
            group: rollouts of each prompt.
            kept: whether the rollouts are kept on disk, and taken from there where they are the same.

        Raises:
            Interrupted: the run was asked to stop before all prompts were read, rolled out and scored. Raised on all
                processes. What was drawn is kept if it was complete.
        """
        self.mark("data")
        prompts, unused = read_prompts(table, rows, self.config.data.num_workers, self.on_wait)
        self.mark("rollout")
        requests = self._requests([prompt for _, prompt, _ in prompts], iteration, group)
        head = self._head(trainer, table, requests, iteration, version, sampling) if kept else None
        rollouts = self.folder.find(head) if head else None
        reused = rollouts is not None
        drawn = self._draw(trainer, requests, version, sampling) if rollouts is None else rollouts
        if head and not reused:
            self.folder.keep(head, drawn)
        prompts, unanswered = _answered(prompts, drawn, group)
        reasons = self.engine.quarantined
        unused += [unused_prompt(prompt.id, ENGINE_FAILED, reasons.get(prompt.id, "")) for prompt in unanswered]
        self.mark("reward")
        found = self.folder.find_verdicts(head, len(drawn)) if head and reused else None
        if reused and dist.get_rank() == 0:
            scores = "their scores too" if found is not None else "without scores that are of these rules"
            logger.info("step %d: its %d rollouts are on disk and are used again, %s", iteration, len(drawn), scores)
        verdicts = self._score(prompts, drawn, group) if found is None else found
        if head:
            self.folder.keep_verdicts(head, drawn, prompts, verdicts, group)
        groups = [
            Group(row, prompt, record, tuple(drawn[span]), tuple(verdicts[span]))
            for (row, prompt, record), span in zip(prompts, spans(len(prompts), group), strict=True)
        ]
        return RolledOut(groups, unused, reused)

    def _requests(self, prompts: Sequence[RolloutPrompt], iteration: int, group: int) -> list[Request]:
        """Return requests whose seeds differ, also where a prompt is there twice."""
        asked, requests = Counter[str](), []
        for prompt in prompts:
            numbers = range(asked[prompt.id], asked[prompt.id] + group)
            seeds = tuple(seed_of(self.config.train.seed, iteration, prompt.id, number) for number in numbers)
            requests.append(Request(prompt, seeds))
            asked[prompt.id] += group
        return requests

    def _draw(self, trainer: TrainStep, requests: Sequence[Request], version: int, sampling: Sampling) -> list[Rollout]:
        if self._published != version:
            self.engine.publish(trainer, version)
            self._published = version
        return self.engine.generate(requests, sampling)

    def _score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], group: int) -> list[Verdict]:
        """Score on the main process, and return the verdicts on all. Collective."""

        def score() -> list[Verdict]:
            if dist.get_rank() > 0:
                return []
            responses = [
                ResponseToScore(record, decode(rollout.tokens.tolist(), self.tokenizer), rollout.finish)
                for (_, _, record), span in zip(prompts, spans(len(prompts), group), strict=True)
                for rollout in rollouts[span]
            ]
            return self.scorer.score(responses, self.on_wait)

        verdicts = [work_together(self._group, score, self.on_wait)]
        dist.broadcast_object_list(verdicts, src=0)
        return verdicts[0]

    # --- on disk ------------------------------------------------------------------------------------------------------

    def _head(
        self,
        trainer: TrainStep,
        table: PromptTable,
        requests: Sequence[Request],
        iteration: int,
        version: int,
        sampling: Sampling,
    ) -> RolloutsHead:
        trainer.synchronize_weights()  # the other ranks' updates may be on their way: a run that resumes has them all
        settings = {
            "prompts": [[request.prompt.id, len(request.prompt.sample)] for request in requests],
            "content": table.fingerprint,
            "group": len(requests[0].seeds) if requests else 0,
            "sampling": asdict(sampling),
            "engine": self.config.rollout.engine,
            "weights": weights_checksum(trainer.model_chunks),
        }
        return RolloutsHead(iteration, version, self.config.train.seed, fingerprint(settings))


def _answered(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], group: int
) -> tuple[list[Prompt], list[RolloutPrompt]]:
    """Return the prompts that have a group of rollouts, and those that the engine has quarantined."""
    answered, unanswered, place = [], [], 0
    for each in prompts:
        if place < len(rollouts) and rollouts[place].prompt_id == each[1].id:
            answered.append(each)
            place += group
        else:
            unanswered.append(each[1])
    return answered, unanswered
