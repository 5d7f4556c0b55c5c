"""Prompts for the tests of the curriculum."""

from __future__ import annotations

from typing import Any

import numpy as np

from rl.curriculum.facts import PromptFacts


def make_facts(kinds: list[int] | np.ndarray, sources: list[int] | None = None, **changed: Any) -> PromptFacts:
    """Return prompts of these kinds, ungraded. `sources` has the source of each kind: one for all unless given."""
    kinds = np.asarray(kinds, np.int64)
    count = len(kinds)
    of_kinds = sources if sources is not None else [0] * (int(kinds.max(initial=0)) + 1)
    values: dict[str, Any] = {
        "ids": [f"a.tar/{row:06d}" for row in range(count)],
        "kinds": kinds,
        "kind_names": [f"source{source}/category{kind}" for kind, source in enumerate(of_kinds)],
        "kind_sources": of_kinds,
        "source_weights": [1.0] * (max(of_kinds) + 1),
        "tiers": np.full(count, -1),
        "passes": np.zeros(count),
        "rollouts": np.zeros(count),
    }
    return PromptFacts(**{**values, **changed})
