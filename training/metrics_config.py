"""The keys of metrics and of the profiler."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.errors import ConfigError
from training.bounds import NOT_NEGATIVE, POSITIVE, check_bounds
from training.trackers import check_trackers


@dataclass
class MetricsConfig:
    """What is measured of every step, and where it is written beside the run folder."""

    peak_tflops: float = 0.0  # TFLOP/s of one device, for mfu; 0: from a table of GPUs
    dead_expert_steps: int = 100  # steps without a token after which dead_experts/window counts an expert
    wandb: str = ""  # project of Weights & Biases, which needs the extra wandb; empty: off
    mlflow: str = ""  # tracking URI of MLflow, which needs the extra mlflow; empty: off
    mlflow_experiment: str = "glmv-train"  # experiment of MLflow

    def __post_init__(self) -> None:
        check_bounds("metrics", self, {"peak_tflops": NOT_NEGATIVE, "dead_expert_steps": POSITIVE})
        check_trackers(self.wandb, self.mlflow, self.mlflow_experiment)


@dataclass
class ProfileConfig:
    """Which steps are profiled, on which ranks."""

    start: int = 0  # first step to profile, from 1; 0: none
    steps: int = 2  # number of steps to profile
    ranks: list[int] = field(default_factory=lambda: [0])  # ranks that write a trace

    def __post_init__(self) -> None:
        check_bounds("profile", self, {"start": NOT_NEGATIVE, "steps": POSITIVE})

    def check(self, steps: int, world_size: int) -> None:
        """Check what depends on the run.

        Raises:
            ConfigError: no step or rank would be profiled although `start` is set.
        """
        if self.start > steps:
            raise ConfigError(f"profile.start={self.start} is after the last step, train.steps={steps}: lower it")
        if self.start and not self.ranks:
            raise ConfigError("profile.ranks is empty: name the ranks to profile, or set profile.start=0")
        for rank in self.ranks:
            if self.start and not 0 <= rank < world_size:
                raise ConfigError(
                    f"profile.ranks names {rank}: {world_size} processes have ranks 0 to {world_size - 1}"
                )
