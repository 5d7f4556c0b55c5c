"""Pass rates: what is known of each prompt, and of each kind, from grades, labels and the run's own rollouts.

    rate(prompt) = (passes + p0 * rate(kind)) / (rollouts + p0)        p0 = curriculum.prior_rollouts
    rate(kind)   = (passes + p0 * before(kind)) / (rollouts + p0)      before(kind): from grades and labels alone

Rollouts are counted, not groups: eight rollouts of a prompt outweigh a prior of one. A prompt's counts are multiplied
by `curriculum.fade` when it is drawn again, those of a kind by `curriculum.kind_fade` in every iteration: a kind
without new rollouts returns slowly to what was known before the run, so that it is tried again.

A prompt with 2 of 8 passes that is drawn again and passes 8 of 8 has 2/2 + 8 = 9 of 8/2 + 8 = 12. With a kind at 0.5
its rate is (9 + 0.5) / (12 + 1) = 0.73.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rl.curriculum.config import CurriculumConfig
from rl.curriculum.facts import PromptFacts
from rl.curriculum.tiers import centres_of

UNKNOWN = 0.5  # pass rate where there is no grade and no label at all


class Counts(NamedTuple):
    """Passes and rollouts of prompts or kinds; both fade, so they are no whole numbers."""

    passes: np.ndarray  # float64 [n]
    rollouts: np.ndarray  # float64 [n]

    def rates(self, prior: np.ndarray | float, prior_rollouts: float) -> np.ndarray:
        """Return the pass rates, float64 [n], where `prior` (float64 [n]) counts for `prior_rollouts` rollouts."""
        return (self.passes + prior_rollouts * prior) / (self.rollouts + prior_rollouts)

    def by_kind(self, kinds: np.ndarray, kind_count: int) -> Counts:
        """Return the sums of each kind, for kinds int [n]."""
        return Counts(
            np.bincount(kinds, self.passes, minlength=kind_count),
            np.bincount(kinds, self.rollouts, minlength=kind_count),
        )


def count_passes(scores: np.ndarray, pass_score: float) -> np.ndarray:
    """Return how many samples of each group pass, int64 [groups], for rewards float [groups, group]."""
    return (np.asarray(scores) >= pass_score).sum(axis=1)


def known_before(facts: PromptFacts, config: CurriculumConfig) -> Counts:
    """Return what is known of each prompt before the run: its grade, or the middle of the tier that people gave."""
    passes, rollouts = facts.passes.astype(np.float64), facts.rollouts.astype(np.float64)
    labelled = (rollouts == 0) & (facts.tiers >= 0)
    centres = centres_of(config.edges)[facts.tiers[labelled]]
    passes[labelled] = config.label_rollouts * centres
    rollouts[labelled] = config.label_rollouts
    return Counts(passes, rollouts)


def rates_of_kinds_before(known: Counts, facts: PromptFacts, config: CurriculumConfig) -> np.ndarray:
    """Return the pass rate of each kind before the run, float64 [kinds]; without grades that of all prompts."""
    by_kind = known.by_kind(facts.kinds, len(facts.kind_names))
    of_all = Counts(by_kind.passes.cumsum()[-1:], by_kind.rollouts.cumsum()[-1:])
    return by_kind.rates(of_all.rates(UNKNOWN, config.prior_rollouts), config.prior_rollouts)
