"""Core attention of the torch backend: packed segments, causal (decoder) or full (vision tower).

A pack holds several samples one after another; `cu_seqlens` says where each begins. A token attends within its own
segment alone:

    cu_seqlens = [0, 3, 5]          query 0 1 2 | 3 4
    causal:                         key   0 x . . | . .
                                          1 x x . | . .
                                          2 x x x | . .
                                          3 . . . | x .
                                          4 . . . | x x

Padding stands at the end of its segment, so no useful token of a causal segment ever sees it.

Under context parallelism a rank has two pieces of every segment (`model.parallel.context_tokens`). It gathers the keys
and values of all ranks, and each of its pieces attends to the segment up to the piece's own end:

    2 ranks, pieces 0 1 2 3         rank 0 has 0 and 3      keys of 0: 0          keys of 3: 0 1 2 3
                                    rank 1 has 1 and 2      keys of 1: 0 1        keys of 2: 0 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from model.parallel import context_tokens

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass
class PackedSegments(PackedSeqParams):
    """megatron-core's description of a pack, and what this module derives from it once for all layers.

    `natural_order` [tokens], on the device: where each token's key lies among those gathered from the context ranks.
    """

    natural_order: Tensor | None = None


def packed_segments(cu_seqlens: Tensor, segment_lengths: Tensor, context_size: int = 1) -> PackedSegments:
    """Segments as megatron-core and Transformer Engine take them: where they begin, and how much of each is useful.

    Args:
        cu_seqlens: int32 [segments + 1], padding included, in main memory.
        segment_lengths: int32 [segments], useful tokens.
        context_size: context-parallel ranks that share the pack.
    """
    useful = F.pad(segment_lengths.cumsum(0), (1, 0)).int()
    longest = int(cu_seqlens.diff().max())
    order = None
    if context_size > 1:
        gathered = torch.cat([context_tokens(cu_seqlens, context_size, rank) for rank in range(context_size)])
        order = gathered.argsort().to(torch.cuda.current_device(), non_blocking=True)
    return PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=useful,
        cu_seqlens_kv=useful,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        natural_order=order,
    )


class SegmentAttention(MegatronModule):
    """Scaled dot-product attention over packed segments, in the slot of megatron-core's `core_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        assert config.kv_channels is not None
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        self.context_group = pg_collection.cp
        self.hidden_size_per_partition = divide(
            config.kv_channels * config.num_attention_heads, pg_collection.tp.size()
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within segments.

        Args:
            query: [tokens of this rank, heads, head_dim].
            key, value: [tokens of this rank, groups, head_dim]; `heads` is a multiple of `groups`.
            attn_mask_type: overrides the mask type given at construction.
            packed_seq_params: `cu_seqlens_kv_padded` (or `cu_seqlens_kv`) [segments + 1], of the whole pack; under
                context parallelism made by `packed_segments`.

        Returns:
            [tokens of this rank, 1, heads * head_dim]
        """
        assert packed_seq_params is not None, "the model always packs"
        causal = (attn_mask_type or self.attn_mask_type) in CAUSAL
        boundaries = packed_seq_params.cu_seqlens_kv_padded
        if boundaries is None:
            boundaries = packed_seq_params.cu_seqlens_kv
        lengths = boundaries.diff().tolist()

        if self.context_group.size() > 1:
            assert causal, "full attention is not cut over context ranks"
            assert isinstance(packed_seq_params, PackedSegments)
            out = self._attend_across_ranks(query, key, value, lengths, packed_seq_params)
        else:
            out = self._attend(query, key, value, lengths, causal)
        return out.permute(2, 0, 1, 3).reshape(-1, 1, self.hidden_size_per_partition)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
        """[1, heads, tokens, head_dim]"""
        q, k, v = (as_heads(x).split(lengths, dim=2) for x in (query, key, value))
        grouped = query.size(1) != key.size(1)
        segments = [
            F.scaled_dot_product_attention(*qkv, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped)
            for qkv in zip(q, k, v, strict=True)
        ]
        return torch.cat(segments, dim=2)

    def _attend_across_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], packed: PackedSegments
    ) -> Tensor:
        """[1, heads, tokens of this rank, head_dim]"""
        ranks, rank = self.context_group.size(), self.context_group.rank()
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.context_group)
        assert packed.natural_order is not None
        keys, values = as_heads(both.index_select(0, packed.natural_order)).chunk(2, dim=-1)
        queries = as_heads(query)
        grouped = query.size(1) != key.size(1)
        pieces = []
        begin = at = 0
        for length in lengths:
            size = length // (2 * ranks)
            for piece in (rank, 2 * ranks - 1 - rank):
                seen = slice(begin, begin + (piece + 1) * size)
                pieces.append(
                    F.scaled_dot_product_attention(
                        queries[:, :, at : at + size],
                        keys[:, :, seen],
                        values[:, :, seen],
                        attn_mask=causal_lower_right(size, (piece + 1) * size),
                        scale=self.softmax_scale,
                        enable_gqa=grouped,
                    )
                )
                at += size
            begin += length
        return torch.cat(pieces, dim=2)


def as_heads(x: Tensor) -> Tensor:
    """[tokens, heads, dim] -> [1, heads, tokens, dim], a view."""
    return x.transpose(0, 1).unsqueeze(0)
