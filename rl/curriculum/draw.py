"""The draw: which prompts an iteration rolls out.

First every source gets its number of prompts, by its share; then a source's prompts are drawn one after another, each
time with probabilities in proportion to the weights of those not yet drawn. So no prompt is drawn twice, and a source's
share does not depend on how many prompts it has, or on how hard they are.

128 prompts, shares 3 and 1, but the first source has only 40 prompts:   40 and 88 prompts
10 prompts of a set of 4:   every prompt twice, and 2 more of the 4

Only uniform numbers of a PCG64 generator, cumulative sums and searches are used. They have the same bits on every
machine, which logarithms do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DIGITS = 9  # of a number of prompts that is not whole; what lies behind them is rounding
ROUNDING = 10.0**-DIGITS


def draw_prompts(
    weights: np.ndarray, rows_of_sources: Sequence[np.ndarray], shares: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the rows that are drawn, int64 [count], in random order.

    A draw of more prompts than there are takes every prompt the same number of times, and draws the rest.

    Args:
        weights: float64 [prompts], above 0.
        rows_of_sources: for each source the rows of its prompts, int64 [prompts of the source].
        shares: float64 [sources], relative.
        count: how many to draw.
        rng: gives the random numbers.
    """
    rounds, rest = divmod(count, len(weights))
    sizes = np.array([len(rows) for rows in rows_of_sources])
    drawn = [np.tile(np.arange(len(weights)), rounds)]
    for rows, number in zip(rows_of_sources, split(rest, shares, sizes, rng), strict=True):
        drawn.append(rows[draw_weighted(weights[rows], int(number), rng)])
    drawn_rows = np.concatenate(drawn)
    return drawn_rows[np.argsort(rng.random(count), kind="stable")]


def split(count: int, shares: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how many prompts each source gives, int64 [sources]; in the mean exactly its share, else within 1 of it.

    What a source cannot give, because it has too few prompts, the others give by their shares.

    Args:
        count: of all; not more than the prompts of all sources.
        shares: float64 [sources], relative, above 0.
        sizes: int64 [sources], prompts of each source.
        rng: decides which sources are rounded up.
    """
    wanted = np.zeros(len(sizes))
    is_open = sizes > 0
    while is_open.any():
        left = count - sizes[~is_open].sum()
        wanted[is_open] = left * shares[is_open] / shares[is_open].cumsum()[-1]
        is_full = is_open & (wanted >= sizes - ROUNDING)
        if not is_full.any():
            break
        wanted[is_full] = sizes[is_full]
        is_open &= ~is_full
    whole = np.floor(wanted + ROUNDING)
    # The fractions lie end to end on a line; one random offset for all says which of them a whole number falls into.
    ends = np.floor((wanted - whole).cumsum().round(DIGITS) + rng.random())
    return (whole + np.diff(ends, prepend=0)).astype(np.int64)


def draw_weighted(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one after another, each in proportion to the weights of what is left. Returns int64 [count], all different.

    Several are drawn at once; one that was drawn before does not count, as if it had weight 0. What is still missing
    is drawn again, without them.

    Args:
        weights: float64 [n], above 0.
        count: at most n.
        rng: gives the random numbers.
    """
    weights = weights.copy()
    drawn: list[np.ndarray] = []
    missing = count
    while missing:
        ends = weights.cumsum()
        found = np.searchsorted(ends, rng.random(missing) * ends[-1], side="right")
        found = found[found < len(ends)]  # a product that was rounded up to the end
        first = np.sort(np.unique(found, return_index=True)[1])
        drawn.append(found[first])
        weights[found] = 0
        missing -= len(first)
    return np.concatenate([np.empty(0, np.int64), *drawn])
