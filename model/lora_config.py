"""The keys of LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from model.errors import ConfigError

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
DROPOUT_STEPS = 65536  # of probabilities: masks are made of 16 bits per value


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685), as PEFT computes them."""

    rank: int = 0  # rank of the adapters; 0: no LoRA, all weights are trained
    alpha: float = 16.0  # an adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # probability with which a value of an adapter's input is dropped in training, below 1
    # modules that get adapters, by the names of transformers: q_proj, mlp.down_proj, visual.*.qkv, experts.*, or
    # all-linear (docs/lora.md)
    targets: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank={self.rank}: give a positive number, or 0 for no LoRA")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"lora.alpha={self.alpha}: give a positive number")
        threshold = dropout_threshold(self.dropout) if math.isfinite(self.dropout) else -1
        if self.dropout and not 0 < threshold < DROPOUT_STEPS:
            raise ConfigError(f"lora.dropout={self.dropout}: give 0, or a number from 0.0001 to 0.9999")
        if self.rank and not self.targets:
            raise ConfigError("lora.targets is empty: name modules, such as [q_proj, v_proj], or set lora.rank=0")
        if twice := [target for target in self.targets if self.targets.count(target) > 1]:
            raise ConfigError(f"lora.targets names {twice[0]!r} twice: name it once")

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / self.rank


def dropout_threshold(probability: float) -> int:
    """Return a probability in 65,536ths."""
    return round(probability * DROPOUT_STEPS)
