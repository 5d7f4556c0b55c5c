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
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


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
            query: [tokens, heads, head_dim].
            key, value: [tokens, groups, head_dim]; `heads` is a multiple of `groups`.
            attn_mask_type: overrides the mask type given at construction.
            packed_seq_params: `cu_seqlens_kv_padded` (or `cu_seqlens_kv`) [segments + 1]; must cover all tokens.

        Returns:
            [tokens, 1, heads * head_dim]
        """
        assert packed_seq_params is not None, "the model always packs"
        causal = (attn_mask_type or self.attn_mask_type) in CAUSAL
        boundaries = packed_seq_params.cu_seqlens_kv_padded
        if boundaries is None:
            boundaries = packed_seq_params.cu_seqlens_kv
        lengths = boundaries.diff().tolist()

        q, k, v = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value))
        grouped = query.size(1) != key.size(1)
        segments = [
            F.scaled_dot_product_attention(*qkv, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped)
            for qkv in zip(q, k, v, strict=True)
        ]
        out = torch.cat(segments, dim=2)  # [1, heads, tokens, head_dim]
        return out.permute(2, 0, 1, 3).reshape(-1, 1, self.hidden_size_per_partition)
