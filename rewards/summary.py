"""The summary of a file of answers: how many, the mean score, and why, per domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

_REASONS_SHOWN = 6


@dataclass
class Counts:
    """What happened to the lines of one domain."""

    lines: int = 0
    scored: int = 0
    total: float = 0.0  # of the scores
    unexpected: int = 0
    expecting: int = 0  # lines that say what they expect
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add the counts of another domain."""
        self.lines += other.lines
        self.scored += other.scored
        self.total += other.total
        self.unexpected += other.unexpected
        self.expecting += other.expecting
        self.reasons += other.reasons


class Summary:
    """Counts by domain, in the order in which domains first appear."""

    def __init__(self) -> None:
        self.domains: dict[str, Counts] = {}
        self.not_as_expected: list[str] = []  # ids

    def add(self, domain: str, answer: Mapping[str, Any], as_expected: bool | None) -> None:
        """Count one line of output."""
        counts = self.domains.setdefault(domain, Counts())
        counts.lines += 1
        counts.reasons[answer["reason"]] += 1
        if answer["score"] is not None:
            counts.scored += 1
            counts.total += answer["score"]
        if as_expected is not None:
            counts.expecting += 1
        if as_expected is False:
            counts.unexpected += 1
            self.not_as_expected.append(str(answer["id"]))

    @property
    def all_well(self) -> bool:
        """Whether no line was an error or scored otherwise than it expects."""
        return not self.not_as_expected and not any(counts.reasons["error"] for counts in self.domains.values())


def table(summary: Summary) -> Table:
    """Return the table of a summary, with a line for all domains."""
    whole = Counts()
    for counts in summary.domains.values():
        whole.add(counts)
    shown = Table("domain", box=None, header_style="bold")
    for heading in ("lines", "scored", "mean"):
        shown.add_column(heading, justify="right")
    if whole.expecting:
        shown.add_column("as expected", justify="right")
    shown.add_column("reasons")
    for name, counts in [*summary.domains.items(), ("all", whole)]:
        mean = f"{counts.total / counts.scored:.3f}" if counts.scored else "-"
        cells = [name, str(counts.lines), str(counts.scored), mean]
        if whole.expecting:
            cells.append(f"{counts.expecting - counts.unexpected}/{counts.expecting}")
        shown.add_row(*cells, _reasons(counts.reasons))
    if summary.not_as_expected:
        shown.caption = "not as expected: " + ", ".join(summary.not_as_expected[:50])
    return shown


def _reasons(reasons: Counter[str]) -> str:
    common = reasons.most_common(_REASONS_SHOWN)
    rest = sum(reasons.values()) - sum(count for _, count in common)
    return ", ".join([*(f"{name} {count}" for name, count in common), *([f"other {rest}"] if rest else [])])
