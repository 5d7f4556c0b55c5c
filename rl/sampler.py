"""Which prompts the next iteration draws: the prompts of all sources, their curriculum, and how many are drawn.

It stands where other stages have a loader of packs: it is made before the processes join, its state is part of the
checkpoint, and every process has the same.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.loading.quarantine import Tally
from data_pipeline.loading.source import Source
from data_pipeline.plan.mixture_report import DomainShare, SourceUse
from model.errors import CheckpointError
from rl.config import RlConfig
from rl.curriculum.curriculum import Curriculum
from rl.expansion import Expansion
from rl.prompts import PromptTable
from rl.reward_checks import changes_of_registry
from rl.scoring import read_registry_of

STATE_FORMAT = 1


class PromptSampler:
    """Draws prompts.

    Args:
        config: of the run.
        table: its prompts.

    Attributes:
        begins_again: whether the curriculum of a checkpoint was of other prompts, and begins again here.
        changed: lines about the content of prompts and the registry of rewards, where they are not the checkpoint's.
        tally: how many prompts were read, and how many could not be.
    """

    def __init__(self, config: RlConfig, table: PromptTable) -> None:
        self.config, self.table = config, table
        self.curriculum = Curriculum(config.curriculum, table.facts, config.data.seed)
        self.expansion = Expansion(config.expansion)
        self.tally = Tally()
        self.begins_again = False
        self.changed: list[str] = []
        self._registry = asdict(read_registry_of(config.reward))

    def draw(self, iteration: int) -> np.ndarray:
        """Return the prompts of an iteration, int64 rows of the table. A function of the seed and the state alone."""
        return self.curriculum.draw(iteration, self.expansion.count(self.config.rl.prompts))

    def observe(self, rows: np.ndarray, passes: np.ndarray, rollouts: np.ndarray, valid_share: float) -> None:
        """Take in the rewards of an iteration.

        Args:
            rows: int64 [prompts], as drawn.
            passes: float [prompts], rollouts that passed.
            rollouts: float [prompts], all of them.
            valid_share: of the groups that have differences.
        """
        self.curriculum.observe(rows, passes, rollouts)
        self.expansion.observe(valid_share)

    def tiers(self, rows: np.ndarray) -> list[str]:
        """Return the name of each prompt's tier, as the metrics call it; tier_0 is the hardest."""
        return [f"tier_{tier}" for tier in self.curriculum.tiers[rows].tolist()]

    def report(self) -> dict[str, float]:
        """Return the metrics of the last draw and of what it followed from."""
        return {**self.curriculum.report(), "expansion/ratio": self.expansion.ratio}

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a crash, as JSON types."""
        return {
            "format": STATE_FORMAT,
            "content": self.table.fingerprint,
            "curriculum": self.curriculum.state_dict(),
            "expansion": self.expansion.state_dict(),
            "tally": self.tally.state_dict(),
            "tokenizer": self.tokenizer.hash,
            "registry": self._registry,
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> None:
        """Continue where `state` was taken.

        Args:
            state: from `state_dict`.
            allow_changes: begin the curriculum again where the prompts are others.

        Raises:
            DataError: the state is another stage's, or the content of the prompts has changed.
            CheckpointError: it is that of other prompts.
        """
        if state.get("format") != STATE_FORMAT or "curriculum" not in state:
            raise DataError(
                "the checkpoint in train.output_dir is of another stage: choose another train.output_dir, and start "
                "from its weights with model.init_from"
            )
        try:
            self.curriculum.load_state_dict(state["curriculum"])
        except CheckpointError:
            if not allow_changes:
                raise
            self.begins_again = True
        if state.get("content") != self.table.fingerprint and not allow_changes:
            raise DataError(
                "the prompts of data.sources are not those of the checkpoint: a record, an image or a pixel budget has "
                "changed; bring them back, or set checkpoint.allow_changes=true"
            )
        has_other_content = state.get("content") != self.table.fingerprint and not self.begins_again
        if state.get("tokenizer", self.tokenizer.hash) != self.tokenizer.hash and not allow_changes:
            raise DataError(
                f"data.tokenizer {self.tokenizer.folder} is not that of the checkpoint: bring it back, or set "
                "checkpoint.allow_changes=true"
            )
        self.changed = list(changes_of_registry(state.get("registry", self._registry), self._registry))
        if has_other_content:
            self.changed.append(
                "the content of prompts is not that of the checkpoint: their pass rates stay as they were"
            )
        self.expansion.load_state_dict(state["expansion"])
        self.tally.load_state_dict(state["tally"])

    # --- what a run asks of its data ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> GlmTokenizer:
        """The run's tokenizer."""
        return self.table.tokenizer

    @property
    def sources(self) -> list[Source]:
        """The sources of the prompts."""
        return self.table.sources

    @property
    def has_media(self) -> bool:
        """Whether any prompt has images or videos."""
        return any(source.has_media for source in self.sources)

    @property
    def chat_forms(self) -> dict[str, list[str]]:
        """Nothing: the table has refused prompts in another form."""
        return {}

    def expected_work(self) -> tuple[list[int], list[int]]:
        """Return the tokens of segments and the patches of images such as the run's, for the pipeline layout."""
        limits = self.config.rollout
        return self.table.expected_work((limits.max_thinking_tokens + limits.max_answer_tokens) // 2)

    def planned_mixture(self) -> dict[str, DomainShare]:
        """Return nothing: what is drawn depends on the rewards."""
        return {}

    def source_use(self) -> list[SourceUse]:
        """Return nothing: likewise."""
        return []

    def stop_waiting(self) -> None:
        """Wait for lost shards no longer."""
        self.table.stop_waiting()

    def unread(self) -> None:
        """Do nothing: an iteration that is not trained on has not been observed."""

    def close(self) -> None:
        """Close all files."""
        self.table.close()
