"""Advantages of the samples of a group: how much better each is than its group (GRPO).

    grpo      (reward - mean) / standard deviation of the group        1 1 0 0  ->  1 1 -1 -1
    centred    reward - mean                                           1 1 0 0  ->  0.5 0.5 -0.5 -0.5

A group without differences has advantages of exactly 0. Computed it might not: the mean of 0.9, 0.9 and 0.9 is not 0.9
in floating point, and divided by a standard deviation of the same size the rounding would be a full gradient.
"""

from __future__ import annotations

import numpy as np

from rl.selection import have_differences

ADVANTAGES = ("grpo", "centred")


def group_advantages(scores: np.ndarray, kind: str) -> np.ndarray:
    """Return the advantages, float64 [groups, group].

    Args:
        scores: rewards, float [groups, group].
        kind: one of ADVANTAGES. The standard deviation is that of the group itself, not an estimate for more samples.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage {kind!r}: choose one of {', '.join(ADVANTAGES)}")
    scores = np.asarray(scores, np.float64)
    centred = scores - scores.mean(axis=1, keepdims=True)
    centred[~have_differences(scores)] = 0
    if kind == "centred":
        return centred
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True))
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
