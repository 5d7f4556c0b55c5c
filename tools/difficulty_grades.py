"""Grade the prompts of a shard: score the answers of a model, and write how many were right.

shards/dots-00000.grades.arrow                 the grades of a shard that is done
shards/dots-00000.grading-1f0c62aa.jsonl       its prompts that are done, until all are: one file for each grader
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.files import replacing
from data_pipeline.domains.rl_record import RlRecord, read_rl_record
from data_pipeline.errors import BadSample
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.prompt_facts import add_grades, keys_of_prompts, read_grades
from data_pipeline.shards.reader import ShardReader
from tools.difficulty_answers import Answerer, Asked

NEED_A_JUDGE = "need a judge"  # prompts of which no answer was decided
COLUMNS = (BarColumn, MofNCompleteColumn, TimeRemainingColumn)

# Returns the score of each answer to a prompt; None where only a judge could give one.
Score = Callable[[RlRecord, list[str]], list[float | None]]


class DifficultyError(ValueError):
    """The call cannot be used. The message says how to fix it."""


@dataclass
class Graded:
    """What became of the prompts of a shard."""

    shard: str
    prompts: int
    graded_before: bool = False
    resumed: int = 0  # prompts that were answered before a stop
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # by key: right answers, all answers
    undecided: int = 0  # answers that only a judge could score
    unused: Counter[str] = field(default_factory=Counter)  # prompts without a grade, by reason

    def add(self, key: str, right: int, decided: int, undecided: int, reason: str) -> None:
        """Take in a prompt: its right, decided and undecided answers; or why it has none."""
        self.undecided += undecided
        if reason:
            self.unused[reason] += 1
        else:
            self.counts[key] = (right, decided)

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
        before = f" ({self.resumed:,} before the stop)" if self.resumed else ""
        return (
            f"{self.shard}: {len(self.counts):,} of {self.prompts:,} prompts graded{before}{share}{undecided}{unused}"
        )


def grade_shard(
    index: ShardIndex, answerer: Answerer, score: Score, grader: Mapping[str, Any], pass_score: float
) -> Graded:
    """Grade the prompts of a shard, and write the grades beside it. What was done before a stop is not done again.

    Args:
        index: The shard.
        answerer: The model that answers.
        score: Scores its answers.
        grader: What describes the grading. A shard that has one of the same description is not graded again.
        pass_score: The least score of a right answer.

    Raises:
        DifficultyError: The shard has no prompts.
        DataError: Its grades cannot be read, or the model does not answer. No grades are written then.
    """
    keys = set(keys_of_prompts(index.table).to_pylist())
    if not keys:
        raise DifficultyError(f"{index.file} has no prompts (domain rl): give shards of prompts")
    found = Graded(index.file.name, len(keys))
    if dict(grader) in read_grades(index.file, index.header.tar_fingerprint).graders:
        found.graded_before = True
        return found
    progress = Progress(
        TextColumn(index.file.name), *(column() for column in COLUMNS), console=Console(stderr=True), transient=True
    )
    with _Done(index, grader, found) as done, progress:
        bar = progress.add_task("", total=len(keys), completed=len(done.keys))
        for prompt, answers in answerer.answers(_prompts(index, keys - done.keys, found.unused)):
            key = prompt.name.partition("/")[2]
            if isinstance(answers, BadSample):
                done.add(key, 0, 0, 0, answers.reason)
            else:
                scores = score(read_rl_record(prompt.raw.record), answers)
                decided = [one for one in scores if one is not None]
                right = sum(one >= pass_score for one in decided)
                done.add(key, right, len(decided), len(scores) - len(decided), "" if decided else NEED_A_JUDGE)
            progress.advance(bar)
        add_grades(index.file, found.counts, grader)
        done.remove()
    return found


class _Done:
    """The prompts of a shard that are done, in a file that outlives a kill.

    Args:
        index: The shard.
        grader: As for `grade_shard`.
        found: Gets what the file says, and what is added.

    Attributes:
        keys: Of the prompts.
    """

    def __init__(self, index: ShardIndex, grader: Mapping[str, Any], found: Graded) -> None:
        self._head = {"grader": dict(grader), "tar_fingerprint": index.header.tar_fingerprint}
        digest = hashlib.sha256(json.dumps(self._head, sort_keys=True).encode()).hexdigest()
        self._path = index.file.with_suffix(f".grading-{digest[:8]}.jsonl")
        self._found, self.keys = found, set[str]()
        self._file: IO[str] | None = None

    def __enter__(self) -> _Done:
        rows = list(self._read())
        with replacing(self._path) as temporary:  # without what a kill has left of a line
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in [self._head, *rows]), encoding="utf-8")
        for row in rows:
            self._take(*row)
        self._found.resumed = len(rows)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, *row: Any) -> None:
        """Note a prompt that is done; the arguments are those of `Graded.add`."""
        assert self._file is not None
        self._file.write(f"{json.dumps(row)}\n")
        self._file.flush()
        self._take(*row)

    def remove(self) -> None:
        """Remove the file: the shard has its grades."""
        self._path.unlink(missing_ok=True)

    def _take(self, *row: Any) -> None:
        self._found.add(*row)
        self.keys.add(row[0])

    def _read(self) -> Iterator[list[Any]]:
        """Yield the rows of the file, up to a line that is no row."""
        if not self._path.is_file():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        with suppress(ValueError):
            if not lines or json.loads(lines[0]) != self._head:
                return
            for line in lines[1:]:
                row = json.loads(line)
                if not isinstance(row, list) or [type(value) for value in row] != [str, int, int, int, str]:
                    return
                yield row


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
