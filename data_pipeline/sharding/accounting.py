"""The accounts of a build: what became of every item of its inputs, checked unit by unit.

    {"rows": {"given": 100, "in_samples": 97, "rejected": 3, "not_read": 0}}

A kind counts the items of a unit (`Input.given`) apart from reading them. If the items that `read` accounts for are
others, the kind has lost some, and the build stops: no data set may be smaller than its input without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import DataError

FATES = ("in_samples", "rejected", "not_read")


@dataclass
class Accounts:
    """The numbers of items, by level and fate."""

    levels: dict[str, Counter[str]] = field(default_factory=dict)  # level -> counts of "given" and of each fate

    def give(self, items: Mapping[str, int]) -> None:
        """Add items that an input holds."""
        self._add(items, "given")

    def use(self, items: Mapping[str, int], fate: str) -> None:
        """Add items that got one of FATES."""
        self._add(items, fate)

    def missing(self) -> dict[str, int]:
        """Return the number of items without a fate, by level; negative if there are more fates than items."""
        missing = {}
        for level, counts in self.levels.items():
            if difference := counts["given"] - sum(counts[fate] for fate in FATES):
                missing[level] = difference
        return missing

    def check(self, where: str) -> None:
        """Check that every item has got one fate. Raises DataError."""
        for level, count in self.missing().items():
            what = f"{count} {level} have no fate" if count > 0 else f"{-count} {level} too many have a fate"
            raise DataError(
                f"{where}: of {self.levels[level]['given']} {level} given, {what}. This is a fault of the input kind: "
                "please report it, with the file"
            )

    def add(self, other: Accounts) -> None:
        """Add the accounts of another unit or task."""
        for level, counts in other.levels.items():
            self.levels.setdefault(level, Counter()).update(counts)

    def as_json(self) -> dict[str, dict[str, int]]:
        """Return the accounts as the manifest holds them."""
        return {
            level: {name: counts[name] for name in ("given", *FATES)} for level, counts in sorted(self.levels.items())
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Accounts:
        """Read the accounts of a manifest."""
        return cls({level: Counter(counts) for level, counts in content.items()})

    def _add(self, items: Mapping[str, int], name: str) -> None:
        for level, count in items.items():
            self.levels.setdefault(level, Counter())[name] += count
