"""The optimizer and its schedule: distributed AdamW, warm-up and decay, and a learning rate per part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from model.fp8 import Fp8Config
from model.parts import part_of
from training.adam import prefer_group_step_adamw
from training.dtypes import DTYPES
from training.optimizer_config import DECAY_STYLES, OptimizerConfig


def build_optimizer(
    config: OptimizerConfig,
    model: Sequence[DistributedDataParallel],
    dtype: torch.dtype,
    fp8: Fp8Config | None = None,
) -> MegatronOptimizer:
    """Build the distributed optimizer, with float32 main weights if the model's are bf16 or FP8."""
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
        # megatron-core's offload takes the same code path as its precision-aware optimizer.
        use_precision_aware_optimizer=config.is_low_precision or config.offload_fraction > 0,
        # Without the precision-aware optimizer the gradients in DDP's buffer are copied to float32 before the update.
        main_grads_dtype=DTYPES[config.main_grads] if config.is_low_precision else torch.float32,
        exp_avg_dtype=DTYPES[config.exp_avg_dtype],
        exp_avg_sq_dtype=DTYPES[config.exp_avg_sq_dtype],
        optimizer_cpu_offload=config.offload_fraction > 0,
        optimizer_offload_fraction=config.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=True,
        **(fp8 or Fp8Config()).optimizer_fields,
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
        lr_decay_style=DECAY_STYLES[config.decay_style],
        wsd_decay_steps=config.cooldown_steps,
        lr_wsd_decay_style=config.cooldown_style,
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
