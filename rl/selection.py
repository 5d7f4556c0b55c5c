"""Which groups of an iteration are trained on: those with the most even numbers of right and wrong samples.

Rewards of four groups of four, of which two are wanted:

    1 1 1 1     no differences: never trained on
    1 0 0 0     mean 1/4, 1/4 away from 1/2: kept
    1 1 0 0     mean 1/2: kept, and the most even
    1 1 1 0     mean 3/4, 1/4 away: not kept, because the second is as even and was drawn before
"""

from __future__ import annotations

import numpy as np

DIFFERENCE = 1e-6  # rewards of a group that lie closer together than this are equal: 1 - 1/3 and 2/3 are
DIGITS = 9  # distances are compared up to this one, so that 1/6 and 5/6 are as far from 1/2


def have_differences(scores: np.ndarray) -> np.ndarray:
    """Return which groups have samples with different rewards, bool [groups], for rewards [groups, group].

    A group with a reward that is not a number (nan) is not one of them.
    """
    return np.ptp(np.asarray(scores, np.float64), axis=1) > DIFFERENCE


def select_groups(scores: np.ndarray, wanted: int) -> np.ndarray:
    """Return the groups to train on, int64 [at most wanted], in the order in which they were drawn.

    Of the groups with differences those whose mean reward is nearest to 1/2; of equally near ones the first. There are
    fewer than `wanted` where fewer groups have differences.

    Args:
        scores: rewards from 0 to 1, float [groups, group].
        wanted: how many groups to keep.
    """
    scores = np.asarray(scores, np.float64)
    valid = np.flatnonzero(have_differences(scores))
    distances = np.abs(scores[valid].mean(axis=1) - 0.5).round(DIGITS)
    return np.sort(valid[np.argsort(distances, kind="stable")[:wanted]])


def count_groups(scores: np.ndarray, kept: int, pass_score: float) -> dict[str, float]:
    """Return the metrics of an iteration's groups.

    Every group is one of three: `groups/all_right` and `groups/all_wrong` have no differences and do or do not
    pass, the others are valid. `groups/valid_share` is what the expansion observes.

    Args:
        scores: rewards of all groups that were rolled out, float [groups, group].
        kept: how many are trained on.
        pass_score: a reward of at least this is a pass, as the curriculum counts it.
    """
    scores = np.asarray(scores, np.float64)
    valid, passes = have_differences(scores), (scores >= pass_score).all(axis=1)
    return {
        "groups/drawn": len(scores),
        "groups/all_right": int((~valid & passes).sum()),
        "groups/all_wrong": int((~valid & ~passes).sum()),
        "groups/kept": kept,
        "groups/valid_share": float(valid.mean()),
    }
