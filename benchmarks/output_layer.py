"""Memory and time of the output layer with its loss, forward and backward: by parts of the vocabulary, and at once.

    python -m benchmarks.output_layer [--tokens 8192] [--vocabulary 151552] [--hidden 512]

"at once" are a matrix product and megatron-core's `vocab_parallel_cross_entropy`, or torch's `cross_entropy`, which
transformers uses. Each runs in a process of its own; memory is what the process needed beside the hidden states, the
weight and both gradients. By parts, the logits are computed again in the backward pass: four products instead of three.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.linear_cross_entropy import LOGITS_AT_ONCE, LinearCrossEntropy
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel

LIMIT = 1 / 8  # of the memory of megatron-core's loss


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_552)
    parser.add_argument("--hidden", type=int, default=512)
    options = parser.parse_args()
    table = Table("loss", "MiB", "of megatron-core's", "seconds", "of megatron-core's", "largest difference")
    context = multiprocessing.get_context("spawn")
    results = {}
    for name in LOSSES:
        with context.Pool(1) as pool:
            results[name] = pool.apply(measure, (name, options.tokens, options.vocabulary, options.hidden))
    memory, seconds, losses = results["megatron-core"]
    for name, (own_memory, own_seconds, own_losses) in results.items():
        table.add_row(
            name,
            f"{own_memory / 2**20:,.0f}",
            f"{own_memory / memory:.3f}",
            f"{own_seconds:.1f}",
            f"{own_seconds / seconds:.2f}",
            f"{float((own_losses - losses).abs().max()):.1e}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"limit: {LIMIT:.3f} of the memory of megatron-core's loss")


def measure(name: str, tokens: int, vocabulary: int, hidden: int) -> tuple[int, float, Tensor]:
    """Return bytes, seconds and the losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    rng = torch.Generator().manual_seed(0)
    # Logits with the spread of a standard normal distribution: exp() of wider ones has slow denormal numbers.
    inputs = [torch.randn(rows, hidden, generator=rng).div_(hidden**0.25) for rows in (tokens, vocabulary)]
    labels = torch.randint(vocabulary, (tokens,), generator=rng)
    for x in inputs:
        x.requires_grad_().grad = torch.ones_like(x)  # its memory exists already
    loss: Callable[..., Tensor] = LOSSES[name]
    loss(inputs[0][:8], inputs[1][:64], labels[:8] % 64).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the inputs
    before, began = _resident("VmRSS"), time.perf_counter()
    losses = loss(*inputs, labels)
    losses.mean().backward()
    seconds = time.perf_counter() - began
    new_gradients = sum(x.nbytes for x in inputs)  # that are added to `grad`
    return _resident("VmHWM") - before - new_gradients, seconds, losses.detach()


def _resident(kind: str) -> int:
    """Return the bytes in memory of this process: now (VmRSS), or at most since the peak was forgotten (VmHWM)."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].removesuffix("kB")) * 1024


def _by_parts(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return LinearCrossEntropy.apply(hidden, weight, labels, dist.group.WORLD, LOGITS_AT_ONCE)


def _megatrons(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(hidden @ weight.T, labels)


def _torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "by parts": _by_parts,
    "megatron-core": _megatrons,
    "torch": _torchs,
}


if __name__ == "__main__":
    main()
