"""Draw tokens so that a response depends on its seed and the model alone, not on what is computed beside it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return a number for each pair of a seed and a position: the same ones for the same pair, always.

    The n-th number of a seed is that of the generator SplitMix64, started at a hash of the seed.

    Args:
        seeds: uint64 [rows].
        positions: int64 [rows], of the token in its response.

    Returns:
        float64 [rows], uniform in [0, 1).
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _STEP) + (positions.astype(np.uint64) + np.uint64(1)) * _STEP)
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row: the first whose cumulative probability, in float64, is above the row's number.

    Args:
        logits: [rows, vocabulary].
        temperature: Divides the logits. 0: the most likely token, the lowest of several.
        uniform: float64 [rows], in [0, 1).

    Returns:
        Tokens, int64 [rows], and their log-probabilities at the temperature (at 1 where it is 0), float32 [rows].
    """
    scaled = logits.double() / (temperature or 1.0)
    scaled -= scaled.amax(-1, keepdim=True)
    cumulative = scaled.exp().cumsum(-1)  # times the sum of all, which is the last
    total = cumulative[:, -1:]
    if temperature:
        tokens = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
        tokens.clamp_(max=logits.size(-1) - 1)
    else:
        tokens = logits.argmax(-1, keepdim=True)
    return tokens[:, 0], (scaled.gather(-1, tokens) - total.log())[:, 0].float()
