"""Names of data sources and kinds in metrics, where they stand beside names that metrics have themselves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_TAKEN = re.compile(r"tier_\d+")  # reward/tier_0, curriculum/drawn/tier_0


def metric_name(name: str) -> str:
    """Return what metrics call a data source or a kind: "source/tier_1" for one that is called like a tier."""
    return f"source/{name}" if _TAKEN.fullmatch(name) else name


def metric_names(names: Iterable[str]) -> list[str]:
    """Return what metrics call kinds, each by a name of its own: "a/b", "a/b (2)"."""
    seen = Counter[str]()
    found = []
    for name in map(metric_name, names):
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
