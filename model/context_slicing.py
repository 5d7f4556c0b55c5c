"""Which tokens of a pack a context-parallel or tensor-parallel rank works on."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor


def context_tokens(cu_seqlens: Tensor, size: int, rank: int) -> Tensor:
    """Return the tokens of a pack that context-parallel rank `rank` of `size` works on, in its order.

    Every segment is cut into 2 * size chunks. A rank takes one chunk from the front and its mirror image from the back,
    so that all ranks do the same amount of causal attention. With two ranks and segments of 8 and 4 tokens:

        rank 0    0 1 . . . . 6 7 | 8 . . 11
        rank 1    . . 2 3 4 5 . . | . 9 10 .

    Args:
        cu_seqlens: int [segments + 1], in main memory; multiples of 2 * size if size is above 1.
        size: Number of context ranks.
        rank: One of them.

    Returns:
        int64 [tokens / size], positions in the pack.

    Raises:
        ValueError: A segment cannot be cut into 2 * size equal chunks.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    lengths = cu_seqlens.long().diff()
    if (lengths % (2 * size)).any():
        raise ValueError(f"segments of {lengths.tolist()} tokens cannot be cut into {2 * size} equal chunks")
    chunk = lengths // (2 * size)
    begins = cu_seqlens[:-1].long()
    starts = torch.stack([begins + rank * chunk, begins + (2 * size - 1 - rank) * chunk], dim=1).flatten()
    lengths = chunk.repeat_interleave(2)
    first = lengths.cumsum(0) - lengths
    return (starts - first).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def my_context_tokens(cu_seqlens: Tensor) -> Tensor:
    """Return `context_tokens` of this process."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return context_tokens(cu_seqlens, size, rank)


def slice_for_tensor_rank(x: Tensor) -> Tensor:
    """Return this tensor-parallel rank's part of the last dimension, cut as sequence parallelism cuts the sequence."""
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return x.chunk(size, dim=-1)[rank]
