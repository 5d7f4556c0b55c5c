"""What DeepEP's kernels do, over gloo: its two functions as megatron-core calls them. Autograd differentiates them.

A token goes once to each rank that has some of its experts. There its experts of that rank have their local numbers,
and the others -1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor


def fused_dispatch(
    x: Tensor, token_indices: Tensor, token_probs: Tensor, num_experts: int, group: Any, **_: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """Send tokens [tokens, hidden] to the ranks of their experts [tokens, topk]."""
    ranks = range(group.size())
    local = num_experts // group.size()
    rank_of = token_indices // local
    rows = [(rank_of == rank).any(1).nonzero().squeeze(1) for rank in ranks]
    sent = [len(of_rank) for of_rank in rows]
    counts: list[Any] = [None] * group.size()
    dist.all_gather_object(counts, sent, group=group)
    received = [of_rank[group.rank()] for of_rank in counts]
    kept = [rank_of[of_rank] == rank for rank, of_rank in zip(ranks, rows, strict=True)]
    probs = [token_probs[of_rank] * keep for of_rank, keep in zip(rows, kept, strict=True)]
    numbers = [torch.where(keep, token_indices[of_rank] % local, -1) for of_rank, keep in zip(rows, kept, strict=True)]
    order = torch.cat(rows)
    tokens, indices, probs_there = (
        all_to_all(group, each, received, sent) for each in (x[order], torch.cat(numbers), torch.cat(probs))
    )
    tokens_per_expert = indices[indices >= 0].bincount(minlength=local)
    return tokens, indices, probs_there, tokens_per_expert, (order, sent, received, len(x))


def fused_combine(x: Tensor, group: Any, handle: Any, **_: bool) -> tuple[Tensor, None]:
    """Send tokens back and add up what the ranks computed for each."""
    order, sent, received, tokens = handle
    back = all_to_all(group, x, sent, received)
    return x.new_zeros(tokens, x.size(1)).index_add(0, order, back), None


@contextmanager
def deep_ep_over_gloo() -> Iterator[None]:
    """Give megatron-core the functions that it misses where DeepEP is not installed."""
    with (
        patch.object(token_dispatcher, "fused_dispatch", fused_dispatch),
        patch.object(token_dispatcher, "fused_combine", fused_combine),
        patch.object(token_dispatcher, "set_deepep_num_sms", lambda _: None),
    ):
        yield
