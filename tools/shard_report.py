"""What the commands of tools.shard print of their results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.errors import REJECTED
from data_pipeline.sharding.accounting import FATES
from data_pipeline.sharding.tasks import MANIFEST

if TYPE_CHECKING:  # these need torch, which takes a second to import
    from data_pipeline.curation.run import Unfinished
    from data_pipeline.sharding.build import Outcome
    from data_pipeline.sharding.writing import Counts

console = Console()
WIDEST = 120  # columns of tables: no number is cut off in a narrower terminal, or without one
SHOWN_NAMES = 30  # of unused fields, or of what is not read; the manifest lists all


def print_line(text: str) -> None:
    """Print one line as it is: brackets are no markup, and the terminal breaks it."""
    console.print(text, markup=False, soft_wrap=True)


def print_whole(table: Table) -> None:
    """Print a table without cutting off what it holds."""
    Console(width=max(console.width, WIDEST)).print(table)


def print_outcome(outcome: Outcome, out: Path) -> None:
    """Print how far a build into the folder `out` is, and what became of its inputs."""
    if outcome.was_finished:
        print_line(f"{out} is finished already: nothing to do")
    print_counts(outcome.counts, see=f", see {out / REJECTED}" if outcome.finished else "")
    if not outcome.finished:
        print_line(f"{outcome.done} of {outcome.tasks} tasks are done: {MANIFEST} is written when all are")


def print_unfinished(found: Unfinished) -> None:
    """Print how far a curation is that several jobs share."""
    if found.examined < found.shards:
        rest = "the kept samples are decided and written when all are"
    else:
        rest = (
            f"part {found.writer} decides and writes the kept samples; if it was stopped, run its command again, or "
            "the command without a part"
        )
    print_line(f"{found.examined} of {found.shards} shards are examined: {rest}")


def print_counts(counts: Counts, see: str = f", see {REJECTED}") -> None:
    """Print what became of samples and items.

    Args:
        counts: The numbers.
        see: Where the rejected samples are listed; empty: nowhere.
    """
    if counts.domains:
        table = Table("domain", "samples")
        for domain, count in sorted(counts.domains.items()):
            table.add_row(escape(domain), f"{count:,}")
        console.print(table)
    if counts.rejected:
        table = Table("rejected", "samples")
        for reason, count in counts.rejected.most_common():
            table.add_row(escape(reason), f"{count:,}")
        console.print(table)
    if counts.accounts.levels:
        table = Table("given", "items", *(fate.replace("_", " ") for fate in FATES))
        for level, numbers in counts.accounts.as_json().items():
            table.add_row(escape(level), *(f"{number:,}" for number in numbers.values()))
        console.print(table)
    if counts.not_read:
        print_line(f"not read: {named(counts.not_read)}")
    if counts.unused_fields:
        print_line(f"fields that are stored but not used: {named(counts.unused_fields)}")
    rejected = f", rejected: {counts.rejected.total():,}{see}" if counts.rejected else ""
    print_line(f"shards: {len(counts.shards):,}, samples: {counts.samples:,}{rejected}")


def named(counts: Counter[str]) -> str:
    """Return names with their counts; the manifest lists those that are too many to show."""
    most_common = counts.most_common(SHOWN_NAMES)
    shown = ", ".join(f"{name!r} ({count:,})" for name, count in sorted(most_common))
    more = len(counts) - len(most_common)
    return f"{shown}{f' and {more:,} more' if more else ''}"
