"""Curriculum sampling: draws the prompts of an iteration by what the run has learned about their difficulty.

    curriculum = Curriculum(config.curriculum, facts, seed=config.data.seed)
    rows = curriculum.draw(iteration, count)                 a function of seed, iteration and what was observed
    curriculum.observe(rows, passes, rollouts)               after the rewards
    curriculum.report()                                      for metrics.jsonl

All processes of a run may hold one, and have the same as long as they observe the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.errors import CheckpointError
from rl.curriculum.config import CurriculumConfig
from rl.curriculum.draw import draw_prompts
from rl.curriculum.facts import PromptFacts
from rl.curriculum.rates import Counts, known_before, rates_of_kinds_before
from rl.curriculum.state import NUMBERS, ROWS, damaged, pack, unpack
from rl.curriculum.tiers import tiers_of
from rl.curriculum.weights import weights_of_kinds, weights_of_prompts

STREAM = 0x43555252  # keeps these random numbers apart from others that follow from the same seed


class Curriculum:
    """Pass rates of prompts and kinds, and the draws that follow from them.

    Args:
        config: the keys `curriculum.*`.
        prompts: what is known before the run.
        seed: of the draws, 0 or more.

    Raises:
        DataError: a grade or a label cannot be true.
    """

    def __init__(self, config: CurriculumConfig, prompts: PromptFacts, seed: int) -> None:
        prompts.check(tiers=len(config.weights))
        self.config, self.prompts, self.seed = config, prompts, seed
        self.tier_count, self.kind_count = len(config.weights), len(prompts.kind_names)
        self._fingerprint = prompts.fingerprint()
        self._sources = prompts.sources
        self._shares = np.asarray(prompts.source_weights, np.float64)
        self._rows_of_sources = [np.flatnonzero(self._sources == source) for source in range(len(self._shares))]
        self._known = known_before(prompts, config)
        self._kinds_before = rates_of_kinds_before(self._known, prompts, config)
        self._reset()

    def _reset(self) -> None:
        self._counts = Counts(*(values.copy() for values in self._known))
        self._is_seen = np.zeros(len(self.prompts), bool)  # rolled out in this run
        self._kind_counts = Counts(np.zeros(self.kind_count), np.zeros(self.kind_count))
        self._drawn = np.zeros((self.kind_count, self.tier_count), np.int64)  # prompts of the last draw, for the report

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def kind_rates(self) -> np.ndarray:
        """Pass rate of each kind, float64 [kinds]."""
        return self._kind_counts.rates(self._kinds_before, self.config.prior_rollouts)

    @property
    def rates(self) -> np.ndarray:
        """Pass rate of each prompt, float64 [prompts]."""
        return self._counts.rates(self.kind_rates[self.prompts.kinds], self.config.prior_rollouts)

    @property
    def tiers(self) -> np.ndarray:
        """Tier of each prompt, int64 [prompts]; 0 is the hardest."""
        return tiers_of(self.rates, self.config.edges)

    def weights(self, tiers: np.ndarray) -> np.ndarray:
        """Return the weight of each prompt among those of its source, float64 [prompts], for the prompts' tiers."""
        kind_weights = weights_of_kinds(self.kind_rates, self.config)
        return weights_of_prompts(tiers, self.prompts.kinds, kind_weights, self.config)

    # --- an iteration -------------------------------------------------------------------------------------------------

    def draw(self, iteration: int, count: int) -> np.ndarray:
        """Return the rows of the prompts to roll out, int64 [count].

        Only what `report` says of the last draw changes. No row is there twice, unless `count` is more than
        there are prompts: then each is there count // prompts times, and the rest once more.

        Args:
            iteration: its number, 0 or more.
            count: how many prompts.
        """
        rng = np.random.Generator(np.random.PCG64([STREAM, self.seed, iteration]))
        tiers = self.tiers
        rows = draw_prompts(self.weights(tiers), self._rows_of_sources, self._shares, count, rng)
        cells = self.prompts.kinds[rows] * self.tier_count + tiers[rows]
        self._drawn = np.bincount(cells, minlength=self._drawn.size).reshape(self._drawn.shape)
        return rows

    def observe(self, rows: np.ndarray, passes: np.ndarray, rollouts: np.ndarray) -> None:
        """Take in the rollouts of an iteration, those that are not trained on too.

        Args:
            rows: int [groups]; a row that is there twice is one visit with the sum of both.
            passes: [groups], samples whose reward is a pass (`rates.count_passes`).
            rollouts: [groups], samples that have a reward. A group without any changes nothing.
        """
        rows, passes, rollouts = (np.asarray(values) for values in (rows, passes, rollouts))
        has_any = rollouts > 0
        visited, places = np.unique(rows[has_any], return_inverse=True)
        new = Counts(passes[has_any], rollouts[has_any]).by_kind(places, len(visited))
        for values, added in zip(self._counts, new, strict=True):
            values[visited] = self.config.fade * values[visited] + added
        self._is_seen[visited] = True
        of_kinds = new.by_kind(self.prompts.kinds[visited], self.kind_count)
        for values, added in zip(self._kind_counts, of_kinds, strict=True):
            values *= self.config.kind_fade
            values += added

    def report(self) -> dict[str, float]:
        """Return the metrics of the state, and of the last draw before it, by name.

        Tiers and kinds appear as `curriculum/prompts/tier_0`, share of all prompts; `curriculum/weight/tier_0`, share
        of the next draw in the mean; `curriculum/drawn/tier_0` and `curriculum/drawn/SOURCE/CATEGORY`, share of the
        last draw; `curriculum/pass_rate/SOURCE/CATEGORY`. `curriculum/seen` is the share of the prompts that have been
        rolled out.
        """
        tiers, names = self.tiers, self.prompts.kind_names
        held = np.bincount(tiers, minlength=self.tier_count) / len(tiers)
        expected, drawn = self._expected_shares(tiers), self._drawn / max(self._drawn.sum(), 1)
        report = {"curriculum/seen": float(self._is_seen.mean())}
        for name, by_tier in (("prompts", held), ("weight", expected), ("drawn", drawn.sum(axis=0))):
            report |= {f"curriculum/{name}/tier_{tier}": float(share) for tier, share in enumerate(by_tier)}
        for name, by_kind in (("drawn", drawn.sum(axis=1)), ("pass_rate", self.kind_rates)):
            report |= {f"curriculum/{name}/{kind}": float(value) for kind, value in zip(names, by_kind, strict=True)}
        return report

    def _expected_shares(self, tiers: np.ndarray) -> np.ndarray:
        """Return the share of the next draw that each tier has in the mean, float64 [tiers], for a small draw."""
        cells = self._sources * self.tier_count + tiers
        sums = np.bincount(cells, self.weights(tiers), minlength=len(self._shares) * self.tier_count)
        of_sources = sums.reshape(-1, self.tier_count)
        totals = of_sources.sum(axis=1, keepdims=True)
        shares = np.where(totals[:, 0] > 0, self._shares, 0)
        return shares / shares.sum() @ (of_sources / np.where(totals > 0, totals, 1))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart, as JSON types (rl.curriculum.state)."""
        seen = np.flatnonzero(self._is_seen)
        return {
            "prompts": self._fingerprint,
            "rows": pack(seen, ROWS),
            "passes": pack(self._counts.passes[seen], NUMBERS),
            "rollouts": pack(self._counts.rollouts[seen], NUMBERS),
            "kind_passes": pack(self._kind_counts.passes, NUMBERS),
            "kind_rollouts": pack(self._kind_counts.rollouts, NUMBERS),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: the next draws are bit for bit those of the run that saved it.

        Raises:
            CheckpointError: the state belongs to other prompts, or is damaged. Then nothing has changed.
        """
        if state.get("prompts") != self._fingerprint:
            raise CheckpointError(
                "the curriculum's state in the checkpoint belongs to other prompts, kinds, grades or labels than "
                "those of data.sources; give the prompts of the run that saved it, or start a new run from its weights "
                "with model.init_from"
            )
        rows = unpack(state, "rows", ROWS, len(self.prompts)).astype(np.int64)
        if np.any(rows[1:] <= rows[:-1]) or np.any(rows >= len(self.prompts)):
            raise damaged("rows")
        counts = _unpack_counts(state, "passes", "rollouts", len(rows))
        kind_counts = _unpack_counts(state, "kind_passes", "kind_rollouts", self.kind_count)
        self._reset()
        self._is_seen[rows] = True
        for values, loaded in zip(self._counts, counts, strict=True):
            values[rows] = loaded
        self._kind_counts = kind_counts


def _unpack_counts(state: Mapping[str, Any], passes: str, rollouts: str, count: int) -> Counts:
    counts = Counts(unpack(state, passes, NUMBERS, count), unpack(state, rollouts, NUMBERS, count))
    for name, values in zip((passes, rollouts), counts, strict=True):
        if len(values) != count or not np.isfinite(values).all() or np.any(values < 0):
            raise damaged(name)
    if np.any(counts.passes > counts.rollouts):
        raise damaged(passes)
    return counts
