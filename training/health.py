"""What a run does about its own health: hangs, processes that are gone, and steps that must not update the model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from model.config import ConfigError
from training.bounds import NOT_NEGATIVE, POSITIVE, check_bounds

ON_NONFINITE = ("stop", "skip")
ON_SPIKE = ("warn", "skip", "stop")


@dataclass
class HealthConfig:
    """When a run is given up, when a step is bad, and what happens then."""

    hang_seconds: int = 900  # a process without progress for so long ends the run, with all stacks; 0: never
    allowance_seconds: int = 1800  # added in loading, saving, validating and the first step
    # a loss or gradient norm that is not finite: stop the run, or skip (no update of weights, optimizer state and
    # expert biases; the learning rate and the data continue)
    on_nonfinite: str = "stop"
    on_spike: str = "warn"  # a spike (health.spike_factor): warn, skip or stop
    # a step is a spike if its loss or gradient norm is more than this multiple of the median of the last updates;
    # 0: never
    spike_factor: float = 0.0
    spike_window: int = 100  # updates that the median is taken of; there is no spike before the window is full
    max_skipped: int = 10  # steps that may be skipped in a row; one more stops the run

    def __post_init__(self) -> None:
        for key, choices in (("on_nonfinite", ON_NONFINITE), ("on_spike", ON_SPIKE)):
            if getattr(self, key) not in choices:
                raise ConfigError(f"health.{key}={getattr(self, key)!r}: choose one of {', '.join(choices)}")
        bounds = dict.fromkeys(("hang_seconds", "allowance_seconds", "spike_factor"), NOT_NEGATIVE)
        check_bounds("health", self, bounds | dict.fromkeys(("spike_window", "max_skipped"), POSITIVE))
        if 0 < self.spike_factor <= 1:
            raise ConfigError(
                f"health.spike_factor={self.spike_factor} would make every other step a spike; give more than 1, or 0"
            )
        if self.on_spike != "warn" and not self.spike_factor:
            raise ConfigError(
                f"health.on_spike={self.on_spike} has no effect while health.spike_factor is 0; set it, for example to "
                "3"
            )

    @property
    def collective_timeout(self) -> timedelta:
        """The timeout of a collective: later than the watchdog, which says more."""
        if not self.hang_seconds:
            return timedelta(days=30)
        return timedelta(seconds=self.hang_seconds + self.allowance_seconds) + timedelta(minutes=5)
