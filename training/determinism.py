"""Checks that a step gives the same bits when it is computed twice, by the same kernels, network and hardware."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.canonical_names import canonical_name
from model.megatron_versions import clear_recorded_losses
from training.run_errors import NonDeterministicStep
from training.update import KeptExpertBiases

Result = TypeVar("Result")

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  # integers of the size of a gradient


def compute_twice(model_chunks: Sequence[nn.Module], compute: Callable[[], Result], step: int) -> Result:
    """Compute the gradients of a step twice and compare them bit for bit.

    The model is left as after one call of `compute`. Collective.

    Args:
        model_chunks: The model of this rank, wrapped by DDP.
        compute: Fills the gradients of the step.
        step: Number of the step, for the error.

    Returns:
        The result of `compute`.

    Raises:
        NonDeterministicStep: Gradients differ on any rank. Raised on all ranks; the message names a gradient that
            differs on this rank, by its name in the whole model.
    """
    names = [canonical_name(chunk, name) for chunk in model_chunks for name in trained(chunk)]
    # Forward and backward passes of a mixture of experts also move the expert biases.
    biases = KeptExpertBiases(model_chunks)
    compute()
    first = fingerprints(model_chunks)
    biases.restore()
    clear_recorded_losses()
    result = compute()
    differ = [name for name, a, b in zip(names, first, fingerprints(model_chunks), strict=True) if a != b]
    ranks = torch.tensor(float(bool(differ)), device=torch.cuda.current_device())
    dist.all_reduce(ranks)
    if ranks:
        here = f"here {len(differ)} of {len(names)} do, such as {differ[0]}" if differ else "none here"
        raise NonDeterministicStep(
            f"step {step}: computed again, gradients differ on {int(ranks)} of {dist.get_world_size()} processes, "
            f"{here}; set train.deterministic=true, and if that is set, suspect the hardware"
        )
    return result


def fingerprints(model_chunks: Sequence[nn.Module]) -> list[int]:
    """Return a checksum of every gradient: of its bits and of the order of its rows."""
    gradients = [parameter.main_grad for chunk in model_chunks for parameter in trained(chunk).values()]
    return torch.stack([row_checksum(gradient) for gradient in gradients]).tolist() if gradients else []


def row_checksum(tensor: Tensor) -> Tensor:
    """Return a checksum of the bits and the order of the rows of a float32 or bfloat16 tensor, int64."""
    of_row = tensor.view(BITS[tensor.dtype]).reshape(len(tensor), -1).sum(1, dtype=torch.int64)
    return (of_row * torch.arange(1, len(of_row) + 1, device=of_row.device)).sum()


def trained(model: nn.Module) -> dict[str, Any]:
    """Return the parameters that have gradients; once DDP wraps the model, they have `main_grad`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_checksum(model_chunks: Sequence[nn.Module]) -> int:
    """Return a checksum of the bits of all parameters and expert biases, the same on every process. Collective.

    It depends on the layout: the sum over processes counts what several of them hold several times.
    """
    total = torch.zeros((), dtype=torch.int64, device=torch.cuda.current_device())
    for chunk in model_chunks:
        biases = [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
        for name, tensor in (*chunk.named_parameters(), *biases):
            if tensor.dim() and tensor.dtype in BITS:
                total += row_checksum(tensor.detach()) * zlib.crc32(name.encode())
    dist.all_reduce(total)
    return int(total)
