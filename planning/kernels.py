"""What Transformer Engine's kernels allocate and keep, for a device without values.

A fused kernel keeps only what its backward pass needs, and has no temporary tensors of its own. Eager torch keeps more.

    kernel               keeps for the backward pass
    norm                 its input, one number per position
    attention            q, k, v, the output, one number per position and head
    linear, grouped      its input
    SwiGLU               its input
    permutation          where each row went

That is an assumption about Transformer Engine's autograd functions: its modules do not run without a GPU, and no peak
on one has been compared yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import megatron.core.fusions.fused_bias_swiglu as swiglu_kernels
import megatron.core.transformer.moe.token_dispatcher as dispatchers
import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import Tensor

from model.attention import SegmentAttention
from model.backend import NO_FUSED_KERNELS, TorchSpecProvider
from model.linear import ColumnGroupedLinear, GroupedLinear, RowGroupedLinear
from model.megatron_versions import PERMUTE_RESULTS
from model.norm import RMSNorm


class FusedKernelsOnPaper(TorchSpecProvider):
    """A backend whose modules allocate and keep what those of the Transformer Engine backend do."""

    description = "Transformer Engine's kernels, on paper"
    config_fields = NO_FUSED_KERNELS | {"bias_activation_fusion": True, "bias_dropout_fusion": True}

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return FusedNorm

    def core_attention(self) -> type:
        return FlashAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        return TEGroupedMLP, MLPSubmodules(linear_fc1=GroupedColumnsOnPaper, linear_fc2=GroupedRowsOnPaper)


@contextmanager
def fused_kernels(fused: bool = True) -> Iterator[None]:
    """Let the functions that are fused on a GPU allocate their results alone, if `fused`."""
    with ExitStack() as stack:
        for module, names in FUSED.items() if fused else ():
            for name, stand_in in names.items():
                stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


class FusedNorm(RMSNorm):
    """An RMS norm in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FlashAttention(SegmentAttention):
    """Attention in one kernel; context ranks pass keys and values round, the next ones while the present are used."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(query, key, value, self.context_group).flatten(1)[:, None]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        _pass_round(group, key, value)
        out = query.new_empty(query.shape)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[1::-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        accumulated = query.new_empty(query.shape, dtype=torch.float32)
        results = tuple(x.new_empty(x.shape) for x in (query, key, value))
        _pass_round(ctx.group, key, value, *results[1:])
        del accumulated
        return *results, None


def _pass_round(group: Any, *tensors: Tensor) -> None:
    """Send tensors to the next rank of the group, once for each other rank."""
    if group.size() == 1:
        return
    following = dist.get_global_rank(group, (group.rank() + 1) % group.size())
    received = [torch.empty_like(x) for x in tensors]
    for _ in range(group.size() - 1):
        for x in received:
            dist.isend(x, following, group=group)


class GroupedOnPaper(GroupedLinear):
    """A layer of all experts of a rank, in one grouped matrix product."""

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int]) -> tuple[Tensor, None]:
        return _GroupedProduct.apply(x, *self.parameters(recurse=False)), None


class GroupedColumnsOnPaper(GroupedOnPaper, ColumnGroupedLinear):
    """The first layer of experts."""


class GroupedRowsOnPaper(GroupedOnPaper, RowGroupedLinear):
    """The second layer of experts."""


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(len(x), len(weights[0]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return tuple(torch.empty_like(t) if need else None for t, need in zip((x, *weights), needed, strict=True))


class _Rows(torch.autograd.Function):
    """Move rows: the result and the gradient are new, what was moved is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.rows = len(x)
        return x.new_empty(rows, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(ctx.rows, *gradient.shape[1:]), None


class _ChosenProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, rows: int) -> Tensor:
        ctx.shape = probs.shape
        return probs.new_empty(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(ctx.shape), None


def _permute(
    tokens: Tensor, routing_map: Tensor, probs: Tensor, num_out_tokens: int, **_: Any
) -> tuple[Tensor | None, ...]:
    places = tokens.new_empty(len(tokens), 2 * routing_map.size(1) + 1, dtype=torch.int32)
    moved, chosen = _Rows.apply(tokens, num_out_tokens), _ChosenProbabilities.apply(probs, num_out_tokens)
    return (moved, chosen, places, *[None] * (PERMUTE_RESULTS - 3))


def _unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, restore_shape: Any, **_: Any) -> Tensor:
    return _Rows.apply(permuted_tokens, restore_shape[0])


def _sort_chunks(
    input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor | None]:
    return _Rows.apply(input, len(input)), None if probs is None else _Rows.apply(probs, len(probs))


FUSED: dict[Any, dict[str, Any]] = {
    swiglu_kernels: {
        "swiglu": lambda y: y.new_empty(*y.shape[:-1], y.size(-1) // 2),
        "swiglu_back": lambda gradient, y: torch.empty_like(y),
        "weighted_swiglu": lambda y, weights: y.new_empty(*y.shape[:-1], y.size(-1) // 2),
        "weighted_swiglu_back": lambda gradient, y, weights: (torch.empty_like(y), torch.empty_like(weights)),
    },
    dispatchers: {"permute": _permute, "unpermute": _unpermute, "sort_chunks_by_idxs": _sort_chunks},
}
