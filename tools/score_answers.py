"""Ask a model the questions of held-out samples, and score what it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from data_pipeline.domains import build_sample
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.encode import encode_sample
from data_pipeline.errors import BadSample
from data_pipeline.sample import Image, Sample, Video
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.reader import ShardReader
from tools.exported import Exported
from tools.score_questions import SCORED_DOMAINS, Question, questions_of

NO_GOLD = "no expected answer"


@dataclass
class Scores:
    """The scores of all questions, and why samples have none."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # sample, kind, expected, answer, scores
    unscored: Counter[str] = field(default_factory=Counter)  # samples by reason

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the number of questions of each kind and the mean of each of its scores."""
        by_kind: dict[str, list[dict[str, float]]] = {}
        for row in self.rows:
            by_kind.setdefault(row["kind"], []).append(row["scores"])
        return {
            kind: {
                "questions": len(scores),
                **{name: sum(each[name] for each in scores) / len(scores) for name in scores[0]},
            }
            for kind, scores in sorted(by_kind.items())
        }


@dataclass(frozen=True)
class _Asked:
    sample_id: str
    question: Question
    encoded: EncodedSample

    def limit(self, max_new_tokens: int) -> int:
        """Return the longest answer, of which `max_new_tokens` is the most."""
        return min(self.question.max_tokens or max_new_tokens, max_new_tokens)


def score(exported: Exported, indexes: Sequence[ShardIndex], *, limit: int, batch: int, max_new_tokens: int) -> Scores:
    """Ask the model about the samples of shards, and score what it writes.

    Args:
        exported: The model.
        indexes: The shards.
        limit: The number of samples, at equal distances; 0: all.
        batch: Questions that are answered at once.
        max_new_tokens: The longest answer.
    """
    result = Scores()
    places = [(shard, row) for shard in indexes for row in range(shard.table.num_rows)]
    if limit and limit < len(places):
        places = [places[n * len(places) // limit] for n in range(limit)]
    reader = ShardReader()
    shown = track(places, "samples", console=Console(stderr=True), transient=True)
    for asked in _batches(_questions(exported, reader, shown, result.unscored), batch, max_new_tokens):
        answers = exported.generate_batch(
            [each.encoded for each in asked], max_new_tokens=asked[0].limit(max_new_tokens)
        )
        for each, answer in zip(asked, answers, strict=True):
            question = each.question
            result.rows.append(
                {
                    "sample": each.sample_id,
                    "kind": question.kind,
                    "expected": question.expected,
                    "answer": answer,
                    "scores": question.score(answer),
                }
            )
    reader.close()
    return result


def _batches(asked: Iterator[_Asked], size: int, max_new_tokens: int) -> Iterator[list[_Asked]]:
    """Yield lists of at most `size` neighbouring questions whose answers may be equally long."""
    for _, run in groupby(asked, key=lambda each: each.limit(max_new_tokens)):
        while batch := list(islice(run, size)):
            yield batch


def _questions(exported: Exported, reader: ShardReader, places: Any, unscored: Counter[str]) -> Iterator[_Asked]:
    """Yield the questions of samples, and count the samples that have none."""
    for shard, row in places:
        domain = shard.table.column("domain")[row].as_py()
        if domain not in SCORED_DOMAINS:
            unscored[f"domain {domain}"] += 1
            continue
        stored = shard.sample(row)
        try:
            raw = reader.read(str(shard.file), stored)
            counts = {"images": len(raw.images), "videos": len(raw.videos)}
            questions = questions_of(build_sample(raw.record, chat_form=shard.header.chat_form, **counts))
            asked = [
                _Asked(f"{shard.file.name}/{stored.key}", question, _encode(exported, question, raw.images, raw.videos))
                for question in questions
            ]
        except BadSample as error:
            unscored[error.reason] += 1
            continue
        if not asked:
            unscored[NO_GOLD] += 1
        yield from asked


def _encode(exported: Exported, question: Question, images: Sequence[bytes], videos: Sequence[bytes]) -> EncodedSample:
    """Encode a prompt with the images and videos that it reaches."""
    prompt = Sample("prompt", question.prompt)
    return encode_sample(
        prompt,
        images[: prompt.count(Image)],
        videos[: prompt.count(Video)],
        tokenizer=exported.glm_tokenizer,
        budget=exported.budget,
    )


def table_of(result: Scores) -> Table:
    """Return the summary as a table."""
    summary = result.summary()
    names = list(dict.fromkeys(name for scores in summary.values() for name in scores))
    table = Table("answers", *(Column(name.replace("_", " "), justify="right") for name in names), box=SIMPLE_HEAD)
    for kind, scores in summary.items():
        cells = [
            "" if name not in scores else f"{scores[name]:,}" if name == "questions" else f"{scores[name]:.3f}"
            for name in names
        ]
        table.add_row(kind, *cells)
    return table
