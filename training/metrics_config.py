"""What is measured of every step, and where it is written beside the run folder."""

from __future__ import annotations

from dataclasses import dataclass

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
