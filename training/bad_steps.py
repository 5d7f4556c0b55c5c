"""Bad steps: the loss or the gradient norm is not finite, or far above what it was.

A spike is a value above `health.spike_factor` times the median of the last `health.spike_window` steps that updated the
model. With a window of 5 and a factor of 3:

    loss    2.1 2.0 2.2 1.9 2.0 | 6.5   1.8        median 2.0: 6.5 is a spike, and 1.8 is not
                                          |          a skipped step does not enter the window

Every process must judge the same numbers, so that all of them skip the same steps.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from training.health import HealthConfig

WATCHED = {"loss": "loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class BadStep:
    """Why a step is bad, and what happens to it."""

    reason: str
    action: str  # warn, skip or stop
    is_finite: bool

    @property
    def updates(self) -> bool:
        """Whether the model is updated nevertheless."""
        return self.action == "warn"


class BadStepDetector:
    """Judges every step of a run. Its state is part of the checkpoint, so that a resumed run judges the same.

    Args:
        config: the policy.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.skipped_in_a_row = 0
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=config.spike_window) for name in WATCHED}

    def judge(self, loss: float, grad_norm: float) -> BadStep | None:
        """Return what is wrong with a step, or None. Call it once per step, before the update.

        Args:
            loss: of the global batch.
            grad_norm: before clipping; not a number where the loss is not finite.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        bad = self._find(values)
        if bad is not None and bad.action == "skip":
            if self.skipped_in_a_row >= self.config.max_skipped:
                reason = f"{bad.reason}, and the {self.skipped_in_a_row} steps before it were skipped"
                return BadStep(f"{reason} (health.max_skipped)", "stop", bad.is_finite)
            self.skipped_in_a_row += 1
        elif bad is None or bad.updates:
            self.skipped_in_a_row = 0
            if self.config.spike_factor:
                for name, value in values.items():
                    self._recent[name].append(value)
        return bad

    def _find(self, values: dict[str, float]) -> BadStep | None:
        loss, grad_norm = values["loss"], values["grad_norm"]
        if not math.isfinite(loss):
            return BadStep(f"the loss is {loss}", self.config.on_nonfinite, is_finite=False)
        if not math.isfinite(grad_norm):
            reason = f"the gradient norm is {grad_norm}, the loss {loss}"
            return BadStep(reason, self.config.on_nonfinite, is_finite=False)
        for name, text in WATCHED.items():
            recent = self._recent[name]
            if self.config.spike_factor and len(recent) == self.config.spike_window:
                usual = median(recent)
                if values[name] > self.config.spike_factor * usual:
                    times = f"{values[name] / usual:.3g} times" if usual else "above"
                    reason = f"the {text} is {values[name]:.6g}, {times} the median {usual:.6g} of the last updates"
                    return BadStep(reason, self.config.on_spike, is_finite=True)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON types."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"skipped_in_a_row": self.skipped_in_a_row, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned; an empty one, of a run that had no detector, is the start."""
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        for name, values in self._recent.items():
            values.clear()
            values.extend(state.get("recent", {}).get(name, []))
