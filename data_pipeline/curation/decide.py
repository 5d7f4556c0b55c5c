"""The second pass: one process goes through what the first found, filter by filter, and settles what stays.

A filter that compares samples sees those that every filter above it let through, whichever kind it was, so the outcome
is that of going through the recipe from top to bottom with the whole set. What is held in memory is a few bytes a
sample; features and reasons stay in files, of which one shard's are looked at at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.files import replacing
from data_pipeline.curation.candidate import text_of
from data_pipeline.curation.examine import READING, ShardTask, feature_column
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.curation.recipe import Recipe
from data_pipeline.shards.arrow_file import open_arrow_file
from data_pipeline.shards.index import read_index
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader

DROPPED, REPORTED = "filtered.jsonl", "reported.jsonl"


@dataclass
class Step:
    """What one filter did. samples: by (domain, reason)."""

    name: str
    report_only: bool
    samples: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Funnel:
    """What became of a set of samples. read and kept: samples by domain. steps: in the order of the recipe; the first
    is reading itself. unwritten: samples that no filter dropped but no build takes, by reason, see rejected.jsonl.
    recaptioned: samples chosen for it; recaption_failures: (sample, why) of those among them that keep what they had.
    """

    read: Counter[str]
    steps: list[Step]
    kept: Counter[str] = field(default_factory=Counter)
    unwritten: Counter[str] = field(default_factory=Counter)
    recaptioned: int = 0
    recaption_failures: list[tuple[str, str]] = field(default_factory=list)


class Examined:
    """All samples of all shards, as one table: what the first pass wrote."""

    def __init__(self, tasks: list[ShardTask]):
        self.tasks = tasks
        self.tables = [_open(task.out) for task in tasks]
        self.first_rows = np.cumsum([0, *(table.num_rows for table in self.tables)])
        domains: dict[str, int] = {}
        codes = []
        for table in self.tables:
            names = table.column("domain").combine_chunks().dictionary_encode()
            known = np.array(
                [domains.setdefault(name, len(domains)) for name in names.dictionary.to_pylist()], np.int16
            )
            codes.append(known[names.indices.to_numpy()])
        self.domains = list(domains)
        self.domain_codes = np.concatenate([np.empty(0, np.int16), *codes])
        self._reader, self._index = ShardReader(), lru_cache(maxsize=64)(read_index)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def rows_of(self, shard: int) -> slice:
        return slice(int(self.first_rows[shard]), int(self.first_rows[shard + 1]))

    def domain(self, row: int) -> str:
        return self.domains[self.domain_codes[row]]

    def place(self, row: int) -> tuple[int, int]:
        """(number of the shard, row in it)."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return shard, row - int(self.first_rows[shard])

    def key(self, row: int) -> str:
        shard, place = self.place(row)
        return self.tables[shard].column("key")[place].as_py()

    def text(self, row: int) -> str:
        shard, place = self.place(row)
        path = Path(self.tasks[shard].shard)
        stored = self._index(path).sample(place)
        written = [member for member in stored.members if member.kind in ("json", "txt")]
        return text_of(self._reader.read(str(path), ShardSample(stored.key, written)).record)


class _Survivors:
    """What one SetFilter sees: see filters.Survivors."""

    def __init__(self, examined: Examined, column: str, alive: np.ndarray):
        self._examined, self._column, self._alive = examined, column, alive

    def chunks(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        for shard, table in enumerate(self._examined.tables):
            features = table.column(self._column)
            there = self._examined.rows_of(shard)
            chosen = np.flatnonzero(self._alive[there] & pc.is_valid(features).to_numpy())
            if len(chosen):
                yield chosen + there.start, features.take(pa.array(chosen)).combine_chunks()

    def name(self, row: int) -> str:
        shard, place = self._examined.place(row)
        return f"{self._examined.tasks[shard].shown}/{self._examined.tables[shard].column('key')[place].as_py()}"

    def text(self, row: int) -> str:
        return self._examined.text(row)


def decide(examined: Examined, recipe: Recipe, out: Path) -> tuple[np.ndarray, Funnel]:
    """Settles what stays, and writes filtered.jsonl and reported.jsonl: a line a sample, filter by filter, each in the
    order of samples. Returns whether each sample stays, bool [samples], and the counts."""
    alive = np.ones(len(examined), bool)
    names = [("(reading)", False), *((name, step.report_only) for name, step in recipe.filters)]
    counts = np.bincount(examined.domain_codes, minlength=len(examined.domains)).tolist()
    funnel = Funnel(Counter(dict(zip(examined.domains, counts, strict=True))), [Step(*name) for name in names])
    with (
        replacing(out / DROPPED) as to_dropped,
        replacing(out / REPORTED) as to_reported,
        open(to_dropped, "w", encoding="utf-8") as dropped,
        open(to_reported, "w", encoding="utf-8") as reported,
    ):
        for position, (name, report_only) in enumerate(names, start=READING):
            step = recipe.filters[position][1] if position != READING else None
            file = reported if report_only else dropped
            gone: list[int] = []
            for row, drop in _verdicts(examined, step, position, alive):
                _write(file, examined, row, name, drop)
                funnel.steps[position - READING].samples[examined.domain(row), drop.reason] += 1
                if not report_only:
                    gone.append(row)
            alive[gone] = False
    return alive, funnel


def _verdicts(examined: Examined, step: Any, position: int, alive: np.ndarray) -> Iterator[tuple[int, Drop]]:
    """(row, why) of the samples that a filter drops, or reports, out of those alive."""
    yield from _found_alone(examined, position, alive)
    if step is not None and not isinstance(step, Filter):
        yield from step.decide(_Survivors(examined, feature_column(position), alive))


def _found_alone(examined: Examined, position: int, alive: np.ndarray) -> Iterator[tuple[int, Drop]]:
    """What the first pass found at this place of the recipe."""
    for shard, table in enumerate(examined.tables):
        first = int(examined.first_rows[shard])
        for places, findings in (_stopped(table), _reported(table)):
            for chosen in np.flatnonzero(pc.equal(pc.struct_field(findings, "filter"), position).fill_null(False)):
                if alive[first + places[chosen]]:
                    finding = findings[int(chosen)].as_py()
                    yield first + int(places[chosen]), Drop(finding["reason"], finding["detail"])


def _stopped(table: pa.Table) -> tuple[np.ndarray, pa.StructArray]:
    return np.arange(table.num_rows), table.column("stopped").combine_chunks()


def _reported(table: pa.Table) -> tuple[np.ndarray, pa.StructArray]:
    lists = table.column("reported").combine_chunks()
    return np.repeat(np.arange(table.num_rows), lists.value_lengths().to_numpy()), lists.flatten()


def _write(file: TextIO, examined: Examined, row: int, name: str, drop: Drop) -> None:
    shard, _ = examined.place(row)
    line = {"shard": examined.tasks[shard].shown, "key": examined.key(row), "filter": name}
    file.write(json.dumps({**line, "reason": drop.reason, "detail": drop.detail}, ensure_ascii=False) + "\n")


def _open(path: str) -> pa.Table:
    return open_arrow_file(Path(path), "remove it and run the same command again").read_all()
