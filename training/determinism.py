"""Does a step give the same bits twice? What a run asks of its kernels, its communication and its hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from torch import nn

from model.hf_weights import canonical_name

Answer = TypeVar("Answer")


class NonDeterministicStep(ArithmeticError):
    """The same packs gave other gradients when they were computed again."""


def compute_twice(model_chunks: Sequence[nn.Module], compute: Callable[[], Answer], step: int) -> Answer:
    """Call `compute`, which fills the gradients of a step, two times, and compare every gradient bit for bit. Leaves
    the model as one call would. Collective.

    Raises:
        NonDeterministicStep: on all ranks, naming a gradient that differs on this one as the whole model names it.
    """
    names = [canonical_name(chunk, name) for chunk in model_chunks for name in trained(chunk)]
    # The forward and backward of a mixture of experts also move the experts' biases.
    biases = [
        buffer for chunk in model_chunks for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")
    ]
    before = [bias.clone() for bias in biases]
    compute()
    first = fingerprints(model_chunks)
    for bias, value in zip(biases, before, strict=True):
        bias.copy_(value)
    clear_aux_losses_tracker()
    answer = compute()
    differ = [name for name, a, b in zip(names, first, fingerprints(model_chunks), strict=True) if a != b]
    ranks = torch.tensor(float(bool(differ)), device=torch.cuda.current_device())
    dist.all_reduce(ranks)
    if ranks:
        here = f"here in {len(differ)} of {len(names)}, the first that of {differ[0]}" if differ else "none here"
        raise NonDeterministicStep(
            f"step {step}: computed again, gradients differ on {int(ranks)} of {dist.get_world_size()} processes, "
            f"{here}; set train.deterministic=true, and if that is set, suspect the hardware"
        )
    return answer


def fingerprints(model_chunks: Sequence[nn.Module]) -> list[int]:
    """A checksum of the bits of every gradient, which are float32, and of the order of its rows."""
    sums = []
    for parameter in (parameter for chunk in model_chunks for parameter in trained(chunk).values()):
        of_row = parameter.main_grad.view(torch.int32).reshape(len(parameter), -1).sum(1, dtype=torch.int64)
        sums.append((of_row * torch.arange(1, len(of_row) + 1, device=of_row.device)).sum())
    return torch.stack(sums).tolist() if sums else []


def trained(model: nn.Module) -> dict[str, Any]:
    """The parameters that have gradients: those of a model that megatron-core wraps have `main_grad`, float32."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
