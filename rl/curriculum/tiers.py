"""Tiers of difficulty: which tier a pass rate belongs to, and which pass rate a tier stands for.

edges 0.05 0.3 0.7 0.95:   tier 0 (hardest) is below 0.05, tier 1 from 0.05 to below 0.3, ... tier 4 (easiest) from 0.95
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tiers_of(rates: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Return the tier of each pass rate, int64 [prompts], for float64 [prompts] and ascending edges."""
    tiers = np.zeros(len(rates), np.int64)
    for edge in edges:
        tiers += rates >= edge
    return tiers


def centres_of(edges: Sequence[float]) -> np.ndarray:
    """Return the pass rate in the middle of each tier, float64 [tiers]."""
    bounds = np.array([0.0, *edges, 1.0])
    return (bounds[:-1] + bounds[1:]) / 2
