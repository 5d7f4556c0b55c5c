"""Core attention of the torch backend: packed segments, causal (decoder) or full (vision tower).

A pack holds several segments one after another; `cu_seqlens` says where each begins. A token attends only to tokens of
its own segment:

    cu_seqlens = [0, 3, 5]          query 0 1 2 | 3 4
    causal:                         key   0 x . . | . .
                                          1 x x . | . .
                                          2 x x x | . .
                                          3 . . . | x .
                                          4 . . . | x x

Padding is at the end of its segment, so no useful token of a causal segment attends to it.

Under context parallelism a rank has two chunks of every segment (`model.context_slicing`). It gathers the keys and
values of all ranks, and each of its chunks attends to the segment up to the end of the chunk:

    2 ranks, chunks 0 1 2 3         rank 0 has 0 and 3      keys of 0: 0          keys of 3: 0 1 2 3
                                    rank 1 has 1 and 2      keys of 1: 0 1        keys of 2: 0 1 2
"""

from __future__ import annotations

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

from model.context_slicing import context_tokens
from model.to_device import to_device

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def packed_segments(cu_seqlens: Tensor, segment_lengths: Tensor) -> PackedSeqParams:
    """Describe segments in the form that megatron-core and Transformer Engine take.

    Args:
        cu_seqlens: int32 [segments + 1], boundaries with padding, in main memory.
        segment_lengths: int32 [segments], useful tokens of each segment.
    """
    useful = F.pad(segment_lengths.cumsum(0), (1, 0)).int()
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=useful,
        cu_seqlens_kv=useful,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class SegmentAttention(MegatronModule):
    """Scaled dot-product attention over packed segments, for the slot `core_attention` of megatron-core's specs."""

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
            key: [tokens of this rank, groups, head_dim]; `heads` is a multiple of `groups`.
            value: As `key`.
            attention_mask: Unused, megatron-core passes it.
            attn_mask_type: Overrides the mask type of the constructor.
            attention_bias: Unused, megatron-core passes it.
            packed_seq_params: Boundaries of the whole pack's segments: `cu_seqlens_kv_padded` if set, else
                `cu_seqlens_kv`. Context parallelism needs the former, in main memory.

        Returns:
            [tokens of this rank, 1, heads * head_dim].
        """
        assert packed_seq_params is not None, "the model always packs"
        causal = (attn_mask_type or self.attn_mask_type) in CAUSAL
        boundaries = packed_seq_params.cu_seqlens_kv_padded
        if boundaries is None:
            boundaries = packed_seq_params.cu_seqlens_kv
        lengths = boundaries.diff().tolist()

        if self.context_group.size() > 1:
            assert causal, "full attention is not split over context ranks"
            order = pack_order(packed_seq_params, self.context_group.size(), query.device)
            out = self._attend_across_ranks(query, key, value, lengths, order)
        else:
            out = self._attend(query, key, value, lengths, causal)
        return out.view(-1, 1, self.hidden_size_per_partition)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
        """Return [tokens, heads, head_dim]."""
        q, k, v = (as_heads(x).split(lengths, dim=2) for x in (query, key, value))
        grouped = query.size(1) != key.size(1)
        segments = [
            F.scaled_dot_product_attention(*qkv, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped)
            for qkv in zip(q, k, v, strict=True)
        ]
        return torch.cat([as_tokens(segment) for segment in segments])

    def _attend_across_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], order: Tensor
    ) -> Tensor:
        """Return [tokens of this rank, heads, head_dim]; `order` is from `pack_order`."""
        ranks, rank = self.context_group.size(), self.context_group.rank()
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.context_group)
        keys, values = as_heads(both.index_select(0, order)).chunk(2, dim=-1)
        queries = as_heads(query)
        grouped = query.size(1) != key.size(1)
        chunks = []
        begin = at = 0  # of the segment in the pack, and of the chunk among this rank's tokens
        for length in lengths:
            size = length // (2 * ranks)
            for chunk in (rank, 2 * ranks - 1 - rank):
                visible = slice(begin, begin + (chunk + 1) * size)
                chunks.append(
                    F.scaled_dot_product_attention(
                        queries[:, :, at : at + size],
                        keys[:, :, visible],
                        values[:, :, visible],
                        attn_mask=causal_lower_right(size, (chunk + 1) * size),
                        scale=self.softmax_scale,
                        enable_gqa=grouped,
                    )
                )
                at += size
            begin += length
        return torch.cat([as_tokens(chunk) for chunk in chunks])


def as_heads(x: Tensor) -> Tensor:
    """View [tokens, heads, dim] as [1, heads, tokens, dim]."""
    return x.transpose(0, 1).unsqueeze(0)


def as_tokens(x: Tensor) -> Tensor:
    """View [1, heads, tokens, dim] as [tokens, heads, dim]."""
    return x.squeeze(0).transpose(0, 1)


def pack_order(segments: PackedSeqParams, ranks: int, device: Any) -> Tensor:
    """Return the index that puts keys gathered from `ranks` context ranks into the order of the pack.

    The first layer of a micro-batch computes it and keeps it on `segments` for the other layers.

    Returns:
        int64 [tokens], on `device`.
    """
    if not hasattr(segments, "_pack_order"):
        gathered = torch.cat([context_tokens(segments.cu_seqlens_kv_padded, ranks, rank) for rank in range(ranks)])
        segments._pack_order = to_device(gathered.argsort(), device)
    return segments._pack_order
