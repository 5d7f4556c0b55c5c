"""What the curriculum knows about the prompts before the first rollout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError

NO_TIER = -1


@dataclass(frozen=True, eq=False)
class PromptFacts:
    """The prompts of a run, in the order of their rows, by which they are drawn.

    Attributes:
        ids: [prompts], the name of each ("shard.tar/KEY").
        kinds: int [prompts], the kind of each: a number of `kind_names`. A kind is one category of one source.
        kind_names: [kinds], for metrics ("source/category").
        kind_sources: [kinds], the number of the source that each kind belongs to.
        source_weights: [sources], `data.sources[].weight`: share of the prompts drawn, relative to other sources.
        tiers: int [prompts], the difficulty that people gave: 0 is the hardest tier; -1 is unknown.
        passes: float [prompts], rollouts of other models (offline pass@k) that passed.
        rollouts: float [prompts], how many there were; 0 is ungraded.
    """

    ids: Sequence[str]
    kinds: np.ndarray
    kind_names: Sequence[str]
    kind_sources: Sequence[int]
    source_weights: Sequence[float]
    tiers: np.ndarray
    passes: np.ndarray
    rollouts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sources(self) -> np.ndarray:
        """The source of each prompt, int64 [prompts]."""
        return np.asarray(self.kind_sources, np.int64)[self.kinds]

    def check(self, tiers: int) -> None:
        """Check the grades and labels, which come from a user's files.

        Args:
            tiers: how many tiers the curriculum has.

        Raises:
            DataError: there is no prompt, or a grade or a label cannot be true. The first such prompt is named.
        """
        if not len(self):
            raise DataError(
                "there are no prompts: data.sources has no sample that can be used for reinforcement learning"
            )
        graded = np.isfinite(self.rollouts) & (self.passes >= 0) & (self.passes <= self.rollouts)
        if not graded.all():
            row = int(np.argmin(graded))
            raise DataError(
                f"the grade of prompt {self.ids[row]} is {self.passes[row]:g} passes of {self.rollouts[row]:g} "
                "rollouts: grade it again, or remove its grade"
            )
        labelled = (self.tiers >= NO_TIER) & (self.tiers < tiers)
        if not labelled.all():
            row = int(np.argmin(labelled))
            raise DataError(
                f"prompt {self.ids[row]} is labelled tier {self.tiers[row]}, but curriculum.edges makes {tiers} tiers, "
                f"0 (hardest) to {tiers - 1} (easiest): correct the label, or curriculum.edges"
            )

    def fingerprint(self) -> str:
        """Return a hash of everything but the sources' weights: state that belongs to other prompts is not theirs."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\n".join(self.ids).encode())
        digest.update("\n".join(self.kind_names).encode())
        for values, dtype in ((self.kinds, "<i8"), (self.tiers, "<i8"), (self.passes, "<f8"), (self.rollouts, "<f8")):
            digest.update(np.ascontiguousarray(values, dtype).tobytes())
        return digest.hexdigest()
