"""AdamW that keeps its step count in the parameter group, as the fused optimizers for GPUs do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer
import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), equal to torch.optim.AdamW.

    The state of a parameter is `exp_avg` and `exp_avg_sq`, of the parameter's shape; `step` is kept in the group.
    FusedAdam of Transformer Engine and apex has the same form of state, and megatron-core's distributed optimizer
    saves and reshards it.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the two averages.
        eps: Added to the root of the second average.
        weight_decay: Decoupled decay, multiplied by `lr`.
        adam_w_mode: FusedAdam's name for decoupled decay, the only mode here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        assert adam_w_mode, "the weight decay is decoupled"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have gradients; `closure` is not called."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        gradients = [p.grad for p in params]
        exp_avg = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sq = [self.state[p]["exp_avg_sq"] for p in params]
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_div(exp_avg_sq, 1 - beta2 ** group["step"])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, exp_avg, denominators, value=-group["lr"] / (1 - beta1 ** group["step"]))


def prefer_group_step_adamw() -> None:
    """Make megatron-core use GroupStepAdamW where it would fall back to torch.optim.

    It falls back without Transformer Engine and apex. The state of a distributed optimizer with torch.optim's AdamW
    does not load at another layout.
    """
    optimizer: Any = megatron.core.optimizer
    distributed_optimizer: Any = megatron.core.optimizer.distrib_optimizer
    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed_optimizer.Adam = GroupStepAdamW
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed_optimizer.HAVE_APEX_OR_TE = distributed_optimizer.USING_APEX_OPTIMIZER = True
