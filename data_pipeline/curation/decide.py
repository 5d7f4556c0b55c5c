"""The second pass: one process applies the recipe, filter by filter, to the results of the first pass.

A filter that compares samples sees those that every filter above it kept. So the result is that of applying the recipe
from top to bottom to the whole set. Memory is a few bytes per sample; features and reasons stay in files, and those of
one shard are read at a time.
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
from data_pipeline.curation.filters import Filter, Filtered
from data_pipeline.curation.recipe import Recipe
from data_pipeline.errors import UnusedSample
from data_pipeline.shards.arrow_file import open_arrow_file
from data_pipeline.shards.index import read_index
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader

FILTERED, REPORTED = "filtered.jsonl", "reported.jsonl"


@dataclass
class Step:
    """What one filter did."""

    name: str
    report_only: bool
    samples: Counter[tuple[str, str]] = field(default_factory=Counter)  # filtered or reported, by (domain, reason)


@dataclass
class Funnel:
    """The number of samples before and after every filter."""

    read: Counter[str]  # by domain
    steps: list[Step]  # in the order of the recipe; the first one is reading itself
    kept: Counter[str] = field(default_factory=Counter)  # by domain
    unwritten: Counter[str] = field(default_factory=Counter)  # kept by the filters but rejected by the build, by reason
    recaptioned: int = 0  # samples chosen for it
    recaption_failures: list[tuple[str, str]] = field(default_factory=list)  # (sample, why) of those among them


class Examined:
    """All samples of all shards, as one table: the results of the first pass."""

    def __init__(self, tasks: list[ShardTask]) -> None:
        """Open the files of all tasks."""
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
        """Return the number of samples."""
        return int(self.first_rows[-1])

    def rows_of(self, shard: int) -> slice:
        """Return the rows of a shard."""
        return slice(int(self.first_rows[shard]), int(self.first_rows[shard + 1]))

    def domain(self, row: int) -> str:
        """Return the domain of a sample."""
        return self.domains[self.domain_codes[row]]

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its row in it."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return shard, row - int(self.first_rows[shard])

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        shard, row_in_shard = self.locate(row)
        return self.tables[shard].column("key")[row_in_shard].as_py()

    def text(self, row: int) -> str:
        """Return the text of a sample (Candidate.text), read from its shard."""
        shard, row_in_shard = self.locate(row)
        path = Path(self.tasks[shard].shard)
        stored = self._index(path).sample(row_in_shard)
        text_members = [member for member in stored.members if member.kind in ("json", "txt")]
        return text_of(self._reader.read(str(path), ShardSample(stored.key, text_members)).record)


class _RemainingSamples:
    """The samples that one SetFilter sees: see filters.RemainingSamples."""

    def __init__(self, examined: Examined, column: str, remaining: np.ndarray) -> None:
        self._examined, self._column, self._remaining = examined, column, remaining

    def chunks(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        for shard, table in enumerate(self._examined.tables):
            features = table.column(self._column)
            rows = self._examined.rows_of(shard)
            chosen = np.flatnonzero(self._remaining[rows] & pc.is_valid(features).to_numpy())
            if len(chosen):
                yield chosen + rows.start, features.take(pa.array(chosen)).combine_chunks()

    def name(self, row: int) -> str:
        shard, _ = self._examined.locate(row)
        return f"{self._examined.tasks[shard].shown}/{self._examined.key(row)}"

    def text(self, row: int) -> str:
        return self._examined.text(row)


def decide(examined: Examined, recipe: Recipe, out: Path) -> tuple[np.ndarray, Funnel]:
    """Decide which samples are kept, and write filtered.jsonl and reported.jsonl.

    The files have one line per sample, filter by filter, each in the order of samples.

    Args:
        examined: The results of the first pass.
        recipe: The filters.
        out: The folder of the two files.

    Returns:
        Whether each sample is kept, bool [samples], and the counts.
    """
    remaining = np.ones(len(examined), bool)
    names = [("(reading)", False), *((name, step.report_only) for name, step in recipe.filters)]
    counts = np.bincount(examined.domain_codes, minlength=len(examined.domains)).tolist()
    funnel = Funnel(Counter(dict(zip(examined.domains, counts, strict=True))), [Step(*name) for name in names])
    with (
        replacing(out / FILTERED) as filtered_path,
        replacing(out / REPORTED) as reported_path,
        open(filtered_path, "w", encoding="utf-8") as filtered_file,
        open(reported_path, "w", encoding="utf-8") as reported_file,
    ):
        for position, (name, report_only) in enumerate(names, start=READING):
            step = recipe.filters[position][1] if position != READING else None
            file = reported_file if report_only else filtered_file
            removed: list[int] = []
            for row, filtered in _judge(examined, step, position, remaining):
                _write(file, examined, row, name, filtered)
                funnel.steps[position - READING].samples[examined.domain(row), filtered.reason] += 1
                if not report_only:
                    removed.append(row)
            remaining[removed] = False
    return remaining, funnel


def _judge(examined: Examined, step: Any, position: int, remaining: np.ndarray) -> Iterator[tuple[int, Filtered]]:
    """Yield the rows that a filter removes or reports, out of the remaining ones, with reasons."""
    yield from _found_by_first_pass(examined, position, remaining)
    if step is not None and not isinstance(step, Filter):
        yield from step.decide(_RemainingSamples(examined, feature_column(position), remaining))


def _found_by_first_pass(examined: Examined, position: int, remaining: np.ndarray) -> Iterator[tuple[int, Filtered]]:
    """Yield what the first pass found for this filter."""
    for shard, table in enumerate(examined.tables):
        first = int(examined.first_rows[shard])
        for rows, findings in (_stopped(table), _reported(table)):
            for chosen in np.flatnonzero(pc.equal(pc.struct_field(findings, "filter"), position).fill_null(False)):
                if remaining[first + rows[chosen]]:
                    finding = findings[int(chosen)].as_py()
                    yield first + int(rows[chosen]), Filtered(finding["reason"], finding["detail"])


def _stopped(table: pa.Table) -> tuple[np.ndarray, pa.StructArray]:
    return np.arange(table.num_rows), table.column("stopped").combine_chunks()


def _reported(table: pa.Table) -> tuple[np.ndarray, pa.StructArray]:
    lists = table.column("reported").combine_chunks()
    return np.repeat(np.arange(table.num_rows), lists.value_lengths().to_numpy()), lists.flatten()


def _write(file: TextIO, examined: Examined, row: int, name: str, filtered: Filtered) -> None:
    shard, _ = examined.locate(row)
    unused = UnusedSample(
        filtered.reason,
        filtered.detail,
        shard=examined.tasks[shard].shown,
        key=examined.key(row),
        filter=name,
    )
    file.write(json.dumps(unused.as_json(), ensure_ascii=False) + "\n")


def _open(path: str) -> pa.Table:
    return open_arrow_file(Path(path), "remove it and run the same command again").read_all()
