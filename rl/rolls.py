"""Rolling out: prompts are read, an engine answers them, the answers are scored, and all of it is kept on disk.

RUN/rollouts/step_0000012.npz       the rollouts of an iteration (rl.rollouts), written before anything is trained on
RUN/rollouts/step_0000012.jsonl     one line per rollout, to be looked at: text, answer, score and reason

A run that resumes and comes to an iteration whose file is there uses it again, where the same weights would draw the
same: nothing is drawn twice.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from common.files import remove_unfinished, write_text
from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, UnusedSample
from data_pipeline.media.image_files import decode_image
from model.process_groups import same_packs_group
from rewards.verdict import Verdict
from rl.config import RlConfig
from rl.engines.engine import Engine
from rl.errors import RolloutError
from rl.prompts import PromptTable
from rl.rollouts import (
    Request,
    Rollout,
    RolloutPrompt,
    RolloutsHead,
    Sampling,
    fingerprint,
    read_rollouts,
    seed_of,
    write_rollouts,
)
from rl.scoring import ResponseToScore, Scorer
from rl.waiting import patient_group, wait_for_all
from training.batch_broadcast import is_lead
from training.determinism import weights_checksum
from training.metrics import logger, writes_to
from training.samples import decode
from training.step import TrainStep

ROLLOUTS = "rollouts"  # folder in the run's
SHOWN_PROMPTS, SHOWN_IMAGES, THUMBNAIL = 32, 2, 160  # kept to be looked at: of an iteration, of a prompt; pixels
Prompt: TypeAlias = tuple[int, RolloutPrompt, RlRecord]  # with its row


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


class Rolls:
    """Draws and scores rollouts. Collective, as is making one.

    Args:
        config: of the run.
        engine: draws.
        scorer: scores, on the main process.
        tokenizer: of the run.
        mark: called with what begins or makes progress: "data", "rollout", "reward".
    """

    def __init__(
        self,
        config: RlConfig,
        engine: Engine,
        scorer: Scorer,
        tokenizer: GlmTokenizer,
        mark: Callable[[str], None],
    ) -> None:
        self.config, self.engine, self.scorer, self.tokenizer, self.mark = config, engine, scorer, tokenizer, mark
        self.folder = Path(config.train.output_dir) / ROLLOUTS
        self._published = -1
        self._group = patient_group()
        if dist.get_rank() == 0:
            remove_unfinished(self.folder)

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
            Interrupted: as from `read_prompts`.
        """
        self.mark("data")
        prompts, unused = read_prompts(table, rows)
        self.mark("rollout")
        requests = self._requests([prompt for _, prompt, _ in prompts], iteration, group)
        head = self._head(trainer, table, requests, iteration, version, sampling) if kept else None
        rollouts = self._find(head) if head else None
        reused = rollouts is not None
        drawn = self._draw(trainer, requests, version, sampling) if rollouts is None else rollouts
        if head and not reused:
            self._keep_rollouts(head, drawn)
        prompts, unanswered = _answered(prompts, drawn, group)
        reasons = self.engine.quarantined
        unused += [_unused(prompt.id, "engine_failed", reasons.get(prompt.id, "")) for prompt in unanswered]
        self.mark("reward")
        found = self._find_verdicts(head, len(drawn)) if head and reused else None
        if reused and dist.get_rank() == 0:
            scores = "their scores too" if found is not None else "without scores that are of these rules"
            logger.info("step %d: its %d rollouts are on disk and are used again, %s", iteration, len(drawn), scores)
        verdicts = self._score(prompts, drawn, group) if found is None else found
        if head and dist.get_rank() == 0:
            self._keep_verdicts(head, drawn, prompts, verdicts, group)
        groups = [
            Group(row, prompt, record, tuple(drawn[span]), tuple(verdicts[span]))
            for (row, prompt, record), span in zip(prompts, _spans(len(prompts), group), strict=True)
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
        verdicts: list[Any] = [None]
        on_wait = partial(self.mark, "reward")
        if dist.get_rank() == 0:
            responses = [
                ResponseToScore(record, decode(rollout.tokens.tolist(), self.tokenizer), rollout.finish)
                for (_, _, record), span in zip(prompts, _spans(len(prompts), group), strict=True)
                for rollout in rollouts[span]
            ]
            verdicts = [self.scorer.score(responses, on_wait)]
        wait_for_all(self._group, on_wait)
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
        settings = {
            "prompts": [[request.prompt.id, len(request.prompt.sample)] for request in requests],
            "content": table.fingerprint,
            "group": len(requests[0].seeds) if requests else 0,
            "sampling": asdict(sampling),
            "engine": self.config.rollout.engine,
            "weights": weights_checksum(trainer.model_chunks),
        }
        return RolloutsHead(iteration, version, self.config.train.seed, fingerprint(settings))

    def _file(self, iteration: int, suffix: str = ".npz") -> Path:
        return self.folder / f"step_{iteration:07d}{suffix}"

    def _find(self, head: RolloutsHead) -> list[Rollout] | None:
        """Return the rollouts on disk that the same weights have drawn, on all processes. Collective."""
        found: list[Any] = [None]
        file = self._file(head.iteration)
        if dist.get_rank() == 0 and file.is_file():
            try:
                written, rollouts = read_rollouts(file)
                found = [rollouts if written == head else None]
            except RolloutError as error:
                logger.warning("%s; they are drawn again", error)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _find_verdicts(self, head: RolloutsHead, count: int) -> list[Verdict] | None:
        """Return the verdicts on disk on these rollouts, by the same rules and judges, on all processes. Collective."""
        found: list[Any] = [None]
        file = self._file(head.iteration, ".jsonl")
        if dist.get_rank() == 0 and file.is_file():
            with suppress(ValueError, KeyError, TypeError):  # damaged: they are scored again
                lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                if len(lines) == count and {line["scored_by"] for line in lines} <= {self._scored_by(head)}:
                    found = [[Verdict(line["score"], line["reason"]) for line in lines]]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _scored_by(self, head: RolloutsHead) -> str:
        """Return a hash of what the verdicts on a file's rollouts depend on."""
        return fingerprint({"drawn": asdict(head), "scored": self.scorer.settings()})

    def _keep_rollouts(self, head: RolloutsHead, rollouts: Sequence[Rollout]) -> None:
        if dist.get_rank() == 0:
            with writes_to(self.folder):
                self.folder.mkdir(exist_ok=True)
                write_rollouts(self._file(head.iteration), head, rollouts)

    def _keep_verdicts(
        self,
        head: RolloutsHead,
        rollouts: Sequence[Rollout],
        prompts: Sequence[Prompt],
        verdicts: Sequence[Verdict],
        group: int,
    ) -> None:
        """Write what people look at, and remove the files of old iterations."""
        scored_by = self._scored_by(head)
        with writes_to(self.folder):
            lines = (
                json.dumps({**line, "scored_by": scored_by}, ensure_ascii=False)
                for line in self._lines(prompts, rollouts, verdicts, group)
            )
            write_text(self._file(head.iteration, ".jsonl"), "".join(f"{line}\n" for line in lines))
            if keep := self.config.rollout.keep_last:
                remove_before(self.folder, head.iteration - keep + 1)

    def _lines(
        self,
        prompts: Sequence[Prompt],
        rollouts: Sequence[Rollout],
        verdicts: Sequence[Verdict],
        group: int,
    ) -> Iterator[dict[str, Any]]:
        for place, ((_, prompt, record), span) in enumerate(zip(prompts, _spans(len(prompts), group), strict=True)):
            images = [thumbnail(data) for data in prompt.images[:SHOWN_IMAGES]] if place < SHOWN_PROMPTS else []
            for rollout, verdict in zip(rollouts[span], verdicts[span], strict=True):
                yield {
                    "prompt": prompt.id,
                    "number": rollout.number,
                    "question": record.question,
                    "reference": record.reference,
                    "verifier": record.verifier,
                    "source": record.source,
                    "category": record.category,
                    "response": decode(rollout.tokens.tolist(), self.tokenizer),
                    "tokens": len(rollout.tokens),
                    "finish": rollout.finish,
                    "forced": rollout.forced,
                    "version": rollout.version,
                    "score": verdict.score,
                    "reason": verdict.reason,
                    **({"images": images} if images and rollout.number == rollouts[span][0].number else {}),
                }


def remove_before(folder: Path, iteration: int) -> None:
    """Remove the files of earlier iterations. Those of later ones, from before a fall back, may be used again."""
    for file in folder.glob("step_*"):
        if file.suffix in (".npz", ".jsonl") and file.stem < f"step_{iteration:07d}":
            file.unlink()


def _spans(groups: int, size: int) -> Iterator[slice]:
    """Yield the places of each group's rollouts."""
    return (slice(number * size, (number + 1) * size) for number in range(groups))


def thumbnail(data: bytes) -> str:
    """Return a small JPEG of an image as base64."""
    buffer = io.BytesIO()
    image = Image.fromarray(decode_image(data))  # as in training, which reads files that Pillow alone would refuse
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


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


def _unused(prompt_id: str, reason: str, detail: str) -> dict[str, Any]:
    shard, _, key = prompt_id.partition("/")
    return UnusedSample(reason, detail, shard=shard, key=key).as_json()


def read_prompts(table: PromptTable, rows: np.ndarray) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """Read prompts on the lead of the processes that share packs; the others get them without patches. Collective.

    A prompt that one lead cannot read, because storage fails for its machine alone, is used by none: all processes must
    ask for the same ones.

    Returns:
        (row, prompt, record) of each prompt that can be used, and lines of quarantine.jsonl of the others.

    Raises:
        Interrupted: A lead waited for a lost shard when the run was asked to stop. Raised on all processes, as is any
            other error of a lead.
    """
    read: list[Prompt] = []
    unused: dict[int, dict[str, Any]] = {}  # by row
    failure: Exception | None = None
    if is_lead():
        try:
            for row in rows.tolist():
                try:
                    read.append((row, *table.read(row)))
                except BadSample as error:
                    unused[row] = _unused(table.facts.ids[row], error.reason, error.detail)
        except Exception as error:  # the other processes wait
            failure = error
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (unused, failure))
    if failures := [failed for _, failed in everyone if failed is not None]:
        raise failures[0]
    unused = {row: line for lines, _ in reversed(everyone) for row, line in lines.items()}
    prompts = [each for each in read if each[0] not in unused]
    group = same_packs_group()
    if group.size() > 1:
        sent: list[Any] = [[(row, _without_media(prompt), record) for row, prompt, record in prompts]]
        dist.broadcast_object_list(sent, src=dist.get_global_rank(group, 0), group=group)
        prompts = prompts if is_lead() else sent[0]
    return prompts, [unused[row] for row in sorted(unused)]


def _without_media(prompt: RolloutPrompt) -> RolloutPrompt:
    sample = replace(prompt.sample, patches=torch.empty(0, prompt.sample.patches.size(1), dtype=torch.uint8))
    return replace(prompt, sample=sample, images=(), videos=())
