"""How probable each prompt is to be drawn next, relative to the other prompts of its source.

    weight(prompt) = curriculum.weights[tier of its pass rate] * weight(kind)
    weight(kind)   = max(curriculum.kind_floor, 4 r (1 - r))       r: the kind's pass rate

4 r (1 - r) is 1 at a pass rate of 1/2 and 0 at 0 and 1: the variance of a reward of 0 or 1, over its largest value. A
kind counts by how much its rollouts differ, which is what advantages are made of.
"""

from __future__ import annotations

import numpy as np

from rl.curriculum.config import CurriculumConfig


def weights_of_kinds(rates: np.ndarray, config: CurriculumConfig) -> np.ndarray:
    """Return the weight of each kind, float64 [kinds], for their pass rates."""
    if config.sampler == "uniform":
        return np.ones(len(rates))
    return np.maximum(config.kind_floor, 4 * rates * (1 - rates))


def weights_of_prompts(
    tiers: np.ndarray, kinds: np.ndarray, kind_weights: np.ndarray, config: CurriculumConfig
) -> np.ndarray:
    """Return the weight of each prompt, float64 [prompts].

    Args:
        tiers: int [prompts].
        kinds: int [prompts].
        kind_weights: float64 [kinds].
        config: has the weights of tiers.
    """
    if config.sampler == "uniform":
        return np.ones(len(tiers))
    return np.asarray(config.weights, np.float64)[tiers] * kind_weights[kinds]
