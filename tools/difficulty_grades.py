"""Grade the prompts of a shard: score the answers of a model, and write how many were right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from data_pipeline.domains.rl_record import RlRecord, read_rl_record
from data_pipeline.errors import BadSample
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.prompt_facts import add_grades, keys_of_prompts, read_grades
from data_pipeline.shards.reader import ShardReader
from rewards.scoring import Task, score_response
from rewards.table import verifier_named
from rewards.verdict import Item, RewardError, Verdict
from tools.difficulty_answers import Answerer, Asked


class DifficultyError(ValueError):
    """The call cannot be used. The message says how to fix it."""


@dataclass
class Graded:
    """What became of the prompts of a shard."""

    shard: str
    prompts: int
    graded_before: bool = False
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # by key: right answers, all answers
    undecided: int = 0  # answers that only a judge could score
    unused: Counter[str] = field(default_factory=Counter)  # prompts without a grade, by reason

    def line(self) -> str:
        """Return one line for the user."""
        if self.graded_before:
            return f"{self.shard}: graded before by this model in this way; nothing to do"
        right, answers = (
            (sum(numbers) for numbers in zip(*self.counts.values(), strict=True)) if self.counts else (0, 0)
        )
        share = f", {right / answers:.1%} of {answers:,} answers right" if answers else ""
        undecided = f", {self.undecided:,} answers only a judge could score" if self.undecided else ""
        unused = "".join(f", {count:,} prompts {reason}" for reason, count in sorted(self.unused.items()))
        return f"{self.shard}: {len(self.counts):,} of {self.prompts:,} prompts graded{share}{undecided}{unused}"


def grade_shard(index: ShardIndex, answerer: Answerer, grader: Mapping[str, Any], pass_score: float) -> Graded:
    """Grade the prompts of a shard, and write the grades beside it.

    Args:
        index: The shard.
        answerer: The model that answers.
        grader: What describes the grading. A shard that has one of the same description is not graded again.
        pass_score: The least score of a right answer.

    Raises:
        DifficultyError: The shard has no prompts.
        DataError: Its grades cannot be read, or the model does not answer. Nothing is written then.
    """
    keys = set(keys_of_prompts(index.table).to_pylist())
    if not keys:
        raise DifficultyError(f"{index.file} has no prompts (domain rl): give shards of prompts")
    found = Graded(index.file.name, len(keys))
    if dict(grader) in read_grades(index.file, index.header.tar_fingerprint).graders:
        found.graded_before = True
        return found
    asked = _prompts(index, keys, found.unused)
    shown = track(asked, index.file.name, len(keys), console=Console(stderr=True), transient=True)
    for prompt, answers in answerer.answers(iter(shown)):
        if isinstance(answers, BadSample):
            found.unused[answers.reason] += 1
            continue
        scores = [_score(answer, read_rl_record(prompt.raw.record), answerer.form) for answer in answers]
        decided = [score for score in scores if score is not None]
        found.undecided += len(scores) - len(decided)
        if decided:
            right = sum(score >= pass_score for score in decided)
            found.counts[prompt.name.partition("/")[2]] = (right, len(decided))
        else:
            found.unused["need a judge"] += 1
    add_grades(index.file, found.counts, grader)
    return found


def _prompts(index: ShardIndex, keys: set[str], unused: Counter[str]) -> Iterator[Asked]:
    reader = ShardReader()
    for row in range(index.table.num_rows):
        stored = index.sample(row)
        if stored.key not in keys:
            continue
        try:
            raw = reader.read(str(index.file), stored, index.header.tar_fingerprint)
        except BadSample as error:
            unused[error.reason] += 1
        else:
            yield Asked(f"{index.file.name}/{stored.key}", raw)
    reader.close()


def _score(answer: str, record: RlRecord, form: str) -> float | None:
    """Return the score of an answer; None if only a judge could give one."""
    try:
        verifier = verifier_named(record.verifier)
    except RewardError as error:  # the shard was built with verifiers of another version
        raise DifficultyError(str(error)) from None
    item = Item(record.question, record.reference, record.settings)
    outcome = score_response(answer, Task(verifier, item, form, record.thinks)).outcome  # type: ignore[arg-type]
    return outcome.score if isinstance(outcome, Verdict) else None
