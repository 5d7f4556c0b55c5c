"""What a run does about its own health: hangs, and processes that are gone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from training.bounds import NOT_NEGATIVE, check_bounds


@dataclass
class HealthConfig:
    """When a run is given up."""

    hang_seconds: int = 900  # a process without progress for so long ends the run, with all stacks; 0: never
    allowance_seconds: int = 1800  # added while weights are loaded or saved, and in the first step

    @property
    def collective_timeout(self) -> timedelta:
        """The timeout of a collective: later than the watchdog, which says more."""
        if not self.hang_seconds:
            return timedelta(days=30)
        return timedelta(seconds=self.hang_seconds + self.allowance_seconds) + timedelta(minutes=5)

    def __post_init__(self) -> None:
        check_bounds("health", self, {"hang_seconds": NOT_NEGATIVE, "allowance_seconds": NOT_NEGATIVE})
