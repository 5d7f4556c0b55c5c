"""Prompts of shards (domain `rl`) by data source, category and verifier: how many of each tier, and how many graded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from data_pipeline.domains.rl_record import TIERS
from data_pipeline.inputs.draft import Input
from data_pipeline.inputs.records.prompt_formats import PromptOptions
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.prompt_facts import earlier_rows, read_facts, read_grades

NO_TIER = "no tier"


def prompts_in(shards: Iterable[ShardIndex]) -> list[dict[str, str | float]]:
    """Return the facts of all prompts, each with the share of its offline answers that were right, if it is graded.

    Raises:
        DataError: The facts or grades of a shard cannot be used.
    """
    found: list[dict[str, str | float]] = []
    for shard in shards:
        fingerprint = shard.header.tar_fingerprint
        grades = read_grades(shard.file, fingerprint)
        for row in read_facts(shard.file, shard.table, fingerprint).to_pylist():
            rollouts = grades.rollouts.get(row["key"], 0)
            found.append({**row, **({"rate": grades.passes[row["key"]] / rollouts} if rollouts else {})})
    return found


def table_of_prompts(prompts: Sequence[dict[str, str | float]]) -> Table:
    """Return the table to print: a row for each source, category and verifier."""
    kinds = sorted({_kind(prompt) for prompt in prompts})
    present = {prompt["tier"] or NO_TIER for prompt in prompts}
    tiers_present = [tier for tier in (*TIERS, NO_TIER) if tier in present]
    columns = (Column(name, justify="right", no_wrap=True) for name in (*tiers_present, "prompts", "graded", "right"))
    names = (Column(name, overflow="fold") for name in ("data source", "category", "verifier"))
    table = Table(*names, *columns, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for kind in kinds:
        of_kind = [prompt for prompt in prompts if _kind(prompt) == kind]
        tiers = Counter(prompt["tier"] or NO_TIER for prompt in of_kind)
        rates = [float(prompt["rate"]) for prompt in of_kind if "rate" in prompt]
        right = f"{sum(rates) / len(rates):.1%}" if rates else ""
        counts = [*(tiers[name] for name in tiers_present), len(of_kind), len(rates)]
        table.add_row(
            *(escape(str(name)) for name in kind), *(f"{count:,}" if count else "" for count in counts), right
        )
    return table


def verifiers_of(inputs: Iterable[Input]) -> dict[str, str]:
    """Return the entries SOURCE:VERIFIER of the option `verifiers`, each with its data source."""
    entries = chain.from_iterable(given.verifiers for given in inputs if isinstance(given, PromptOptions))
    return {entry: entry.rpartition(":")[0] for entry in entries}


def repeated(prompts: Sequence[dict[str, str | float]]) -> int:
    """Return how many prompts ask the same as an earlier one."""
    first = earlier_rows(np.array([prompt["asked"] for prompt in prompts], np.uint64))
    return int((first != np.arange(len(prompts))).sum())


def _kind(prompt: dict[str, str | float]) -> tuple[str, ...]:
    return tuple(str(prompt[name]) for name in ("source", "category", "verifier"))
