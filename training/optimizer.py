"""The optimizer and its schedule: distributed AdamW, warm-up and decay, and a learning rate per part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from model.config import ConfigError
from model.parts import part_of
from training.adam import prefer_group_step_adamw
from training.bounds import FRACTION, NOT_NEGATIVE, POSITIVE, check_bounds

DECAY_STYLES = ("cosine", "linear", "constant")
BOUNDS = {
    "lr": POSITIVE,
    "eps": POSITIVE,  # where a gradient has always been 0, the update would be 0 / 0
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE,
    "beta1": FRACTION,
    "beta2": FRACTION,
}


@dataclass
class LrScale:
    """Learning rates of the model's parts (model.parts), relative to the run's."""

    vision: float = 1.0  # factor of lr and min_lr for the vision tower
    adapter: float = 1.0  # factor of lr and min_lr for the adapter
    decoder: float = 1.0  # factor of lr and min_lr for the decoder without its routers
    router: float = 1.0  # factor of lr and min_lr for the routers

    def __post_init__(self) -> None:
        for part, scale in asdict(self).items():
            if not 0 < scale < float("inf"):
                raise ConfigError(
                    f"optimizer.lr_scale.{part}={scale} must be positive and finite; to leave a part as it is, use "
                    "freeze"
                )


@dataclass
class OptimizerConfig:
    """AdamW. The report names no learning rate, schedule or weight decay: these defaults are this project's choice."""

    lr: float = 1e-4  # highest learning rate
    min_lr: float = 1e-5  # learning rate of the last step
    lr_scale: LrScale = field(default_factory=LrScale)
    warmup_steps: int = 0  # steps in which the learning rate rises linearly from 0; below train.steps
    # cosine or linear: from lr after the warm-up to min_lr at the last step; constant: lr
    decay_style: str = "cosine"
    weight_decay: float = 0.1  # decoupled weight decay; biases and norms have none
    beta1: float = 0.9  # decay rate of Adam's first moment
    beta2: float = 0.95  # decay rate of Adam's second moment
    eps: float = 1e-8  # added to the square root of Adam's second moment
    clip_grad: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    overlap_grad_reduce: bool = True  # reduce gradients during the last backward pass of a step
    overlap_param_gather: bool = True  # gather updated weights during the first forward pass of the next step

    def __post_init__(self) -> None:
        if self.decay_style not in DECAY_STYLES:
            raise ConfigError(f"optimizer.decay_style={self.decay_style!r}: choose one of {', '.join(DECAY_STYLES)}")
        check_bounds("optimizer", self, BOUNDS)
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optimizer.min_lr={self.min_lr} must be between 0 and optimizer.lr={self.lr}")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError(
                "optimizer.overlap_param_gather=true needs optimizer.overlap_grad_reduce=true; set both, or neither"
            )


def build_optimizer(
    config: OptimizerConfig, model: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Build the distributed optimizer, with float32 main weights if the model's are bf16."""
    prefer_group_step_adamw()
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    overrides = get_standard_config_overrides(settings) | learning_rates_of_parts(config)
    return get_megatron_optimizer(settings, list(model), config_overrides=overrides)


def learning_rates_of_parts(config: OptimizerConfig) -> dict[ParamKey, dict[str, Any]]:
    """Return the learning rates of the scaled parts, as overrides of megatron-core's parameter groups.

    The schedule takes max_lr and min_lr from such a group; `part` names it. Parts that are not scaled share the default
    groups.
    """
    return {
        ParamKey(with_name_predicate=_is_in(part)): {
            "max_lr": config.lr * scale,
            "min_lr": config.min_lr * scale,
            "part": part,
        }
        for part, scale in asdict(config.lr_scale).items()
        if scale != 1
    }


def _is_in(part: str) -> ParamWithNamePredicate:
    return ParamWithNamePredicate(name=part, fn=lambda _, name: part_of(name) == part)


def build_scheduler(config: OptimizerConfig, optimizer: MegatronOptimizer, steps: int) -> OptimizerParamScheduler:
    """Build the schedule of the learning rate: `set_step` writes a step's rate into the optimizer."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=config.decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


def set_step(scheduler: OptimizerParamScheduler, step: int) -> float:
    """Set the learning rates of a step, and return the rate of the parts that are not scaled.

    Args:
        scheduler: of `build_scheduler`.
        step: number of the step, from 1. The rate of step 1 is already above 0; that of the last step is
            min_lr, unless the style is constant.
    """
    scheduler.num_steps = step
    scheduler.step(0)
    return scheduler.get_lr({})


def scaled_learning_rates(scheduler: OptimizerParamScheduler) -> dict[str, float]:
    """Return the current learning rates of the scaled parts, by part."""
    return {group["part"]: group["lr"] for group in scheduler.optimizer.param_groups if "part" in group}
