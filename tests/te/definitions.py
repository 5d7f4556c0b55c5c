"""The definitions of what Transformer Engine's kernels compute, in plain torch, for float32 on one rank.

With these in place of the kernels the model of this backend runs on a CPU. That shows whether its modules are assembled
correctly: which norm precedes which matrix, what attention is given, in which order experts get their tokens. The
signatures are those of the real modules. The kernels themselves are tested on a GPU (tests/gpu).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import megatron.core.transformer.moe.moe_utils as moe_utils
import torch
import transformer_engine.pytorch as te
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def linear(module: Any, x: Tensor, **_: Any) -> Tensor:
    return torch.nn.functional.linear(x, module.weight, module.bias if module.use_bias else None)


def norm_and_linear(module: Any, x: Tensor, **_: Any) -> Tensor:
    return linear(module, rms_norm(x, module.layer_norm_weight, module.eps))


def norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.eps)


def grouped_linear(module: Any, x: Tensor, rows: list[int], **_: Any) -> Tensor:
    """Multiply each group of consecutive rows by its own matrix."""
    weights = [getattr(module, f"weight{group}") for group in range(module.num_gemms)]
    return torch.cat([part @ weight.T for part, weight in zip(x.split(rows), weights, strict=True)])


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    qkv_format: str,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    attn_mask_type: str,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    **nothing: None,
) -> Tensor:
    """Attend to the keys of the query's own segment; query [tokens, heads, dim] -> [tokens, heads * dim]."""
    assert qkv_format == "thd"
    assert not any(value is not None for value in nothing.values())
    assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
    assert cu_seqlens_q.device == cu_seqlens_kv.device == query.device
    assert torch.equal(cu_seqlens_q, cu_seqlens_kv)
    assert min(max_seqlen_q, max_seqlen_kv) >= cu_seqlens_q.diff().max()
    position = torch.arange(len(query))
    segment = torch.bucketize(position, cu_seqlens_q, right=True)
    visible = segment[:, None] == segment
    if attn_mask_type == "padding_causal":
        visible &= position[:, None] >= position
    else:
        assert attn_mask_type == "padding"
    key, value = (x.repeat_interleave(query.size(1) // key.size(1), dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.size(-1) ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


DEFINITIONS = {
    te.Linear: linear,
    te.LayerNormLinear: norm_and_linear,
    te.RMSNorm: norm,
    te.GroupedLinear: grouped_linear,
    te.DotProductAttention: attention,
}


@contextmanager
def kernels_by_definition() -> Iterator[None]:
    with ExitStack() as patches:
        for module, definition in DEFINITIONS.items():
            patches.enter_context(mock.patch.object(module, "forward", autospec=True, side_effect=definition))
        patches.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None))  # the router's product, in torch
        yield
