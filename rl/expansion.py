"""Dynamic sampling expansion (report, section 5.3): how many more prompts are drawn than are trained on.

    ratio = 1 / (1 - not_valid)          not_valid: share of the last iteration's groups without differences
    ema   = 0.9 ema + 0.1 ratio          starts at 1; the next iteration draws ceil(prompts * ema)

So the number of rollouts is known before they begin. The report gives the two formulas, but not the decay of the EMA,
its start, or what happens where no group is valid and the ratio is infinite: here it is at most `expansion.max_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.errors import CheckpointError
from training.bounds import FRACTION, Bound, check_bounds

ROUNDING = 1e-9  # 100 * 1.0000000000000002 is 100 prompts, not 101


@dataclass
class ExpansionConfig:
    """Drawing more prompts than are trained on, because groups without differences teach nothing."""

    enabled: bool = True  # draw more prompts than are trained on; false: as many
    decay: float = 0.9  # of the moving average of the ratio: what its last value counts
    max_ratio: float = 4.0  # most prompts drawn for each that is trained on

    def __post_init__(self) -> None:
        at_least_1 = Bound(lambda value: value >= 1, "a number from 1")
        check_bounds("expansion", self, {"decay": FRACTION, "max_ratio": at_least_1})


class Expansion:
    """The moving average of the ratio.

    Attributes:
        ratio: prompts drawn for each that is trained on, 1 or more.
    """

    def __init__(self, config: ExpansionConfig) -> None:
        self.config = config
        self.ratio = 1.0

    def count(self, prompts: int) -> int:
        """Return how many prompts the next iteration draws in order to train on `prompts`."""
        return math.ceil(prompts * self.ratio - ROUNDING)

    def observe(self, valid_share: float) -> None:
        """Take in the share of an iteration's groups that have differences, from 0 to 1."""
        if self.config.enabled:
            most = self.config.max_ratio
            ratio = min(1 / valid_share, most) if valid_share > 0 else most
            self.ratio += (1 - self.config.decay) * (ratio - self.ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart, as JSON types."""
        return {"ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Keys that have changed since apply: the ratio is cut to `max_ratio`, or is 1 again.

        Raises:
            CheckpointError: the state is damaged.
        """
        ratio = state.get("ratio")
        if not isinstance(ratio, int | float) or not 1 <= ratio < math.inf:
            raise CheckpointError(
                f"the state of the expansion in the checkpoint is damaged (ratio {ratio}); use another step"
            )
        self.ratio = min(float(ratio), self.config.max_ratio) if self.config.enabled else 1.0
