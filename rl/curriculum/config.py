"""The `curriculum.*` keys. The report describes the method without numbers: every default is a choice of this project.

Given by the report (section 5.3): difficulty grades by pass@k and by people, merged with the pass rates of the run's
own rollouts; several tiers from very easy to very hard; in every iteration fewer prompts that are too easy or still too
hard, more from the middle, by tier and by the performance of sub-categories. Not given: how many tiers, their edges and
weights, how old rollouts fade, and how grades and rollouts are merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from model.errors import ConfigError
from training.bounds import NOT_NEGATIVE, POSITIVE, SHARE, Bound, check_bounds

SAMPLERS = ("rlcs", "uniform")
LARGEST_RATIO = 1e6  # of two weights: more would be rounded away where a million weights are added
FLOOR = Bound(lambda value: 1e-3 <= value <= 1, "a number from 0.001 to 1")
ABOVE_0_TO_1 = Bound(lambda value: 0 < value <= 1, "a number above 0, up to 1")
INSIDE_0_AND_1 = Bound(lambda value: 0 < value < 1, "numbers above 0 and below 1")


@dataclass
class CurriculumConfig:
    """How prompts are drawn for the next iteration, from how often the model has answered them right."""

    sampler: str = "rlcs"  # rlcs: by tier and kind; uniform: every prompt of a source with the same probability
    # pass rates that separate the tiers, ascending; a prompt on an edge is in the easier tier
    edges: list[float] = field(default_factory=lambda: [0.05, 0.3, 0.7, 0.95])
    # weight of a prompt by its tier, from the hardest tier to the easiest: one more than curriculum.edges
    weights: list[float] = field(default_factory=lambda: [0.05, 0.7, 1.0, 0.7, 0.05])
    # smallest weight of a kind (source x category), at pass rate 0 or 1; at 1/2 it is 1. 1: all kinds weigh the same
    kind_floor: float = 0.25
    fade: float = 0.5  # what a prompt's earlier rollouts count when it is drawn again
    kind_fade: float = 0.8  # what a kind's earlier rollouts count after each iteration
    prior_rollouts: float = 1.0  # rollouts that the kind's pass rate counts for in the pass rate of each of its prompts
    label_rollouts: float = (
        4.0  # rollouts that a tier given by people counts for, of a prompt without grades; 0: ignored
    )
    pass_score: float = 0.75  # a reward of at least this is a pass

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"curriculum.sampler={self.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        _check_each("edges", self.edges, INSIDE_0_AND_1)
        _check_each("weights", self.weights, POSITIVE)
        if not self.edges or any(low >= high for low, high in pairwise(self.edges)):
            raise ConfigError(
                f"curriculum.edges={self.edges}: give at least one pass rate, each above the one before it"
            )
        if len(self.weights) != len(self.edges) + 1:
            raise ConfigError(
                f"curriculum.weights has {len(self.weights)} numbers, but the {len(self.edges)} numbers of "
                f"curriculum.edges make {len(self.edges) + 1} tiers: give one weight for each tier"
            )
        if max(self.weights) > LARGEST_RATIO * min(self.weights):
            raise ConfigError(
                f"curriculum.weights={self.weights}: one is more than {LARGEST_RATIO:,.0f} times another; "
                "raise the smallest"
            )
        bounds = dict.fromkeys(("fade", "kind_fade"), SHARE) | {"kind_floor": FLOOR, "pass_score": ABOVE_0_TO_1}
        check_bounds("curriculum", self, {**bounds, "prior_rollouts": POSITIVE, "label_rollouts": NOT_NEGATIVE})


def _check_each(key: str, values: list[float], bound: Bound) -> None:
    if not all(bound.holds(value) and value < float("inf") for value in values):
        raise ConfigError(f"curriculum.{key}={values}: give {bound.wanted}")
