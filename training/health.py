"""What a run does about its own health: steps that must not update the model."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ConfigError
from training.bounds import NOT_NEGATIVE, POSITIVE, check_bounds

ON_NONFINITE = ("stop", "skip")
ON_SPIKE = ("warn", "skip", "stop")


@dataclass
class HealthConfig:
    """When a step is bad, and what happens then."""

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
        bounds = {"spike_factor": NOT_NEGATIVE, "spike_window": POSITIVE, "max_skipped": POSITIVE}
        check_bounds("health", self, bounds)
        if 0 < self.spike_factor <= 1:
            raise ConfigError(
                f"health.spike_factor={self.spike_factor} would make every other step a spike; give more than 1, or 0"
            )
        if self.on_spike != "warn" and not self.spike_factor:
            raise ConfigError(
                f"health.on_spike={self.on_spike} has no effect while health.spike_factor is 0; set it, for example to "
                "3"
            )
