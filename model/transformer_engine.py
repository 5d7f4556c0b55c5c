"""The Transformer Engine backend: NVIDIA's fused kernels in the leaf modules. Imported only where they are installed.

megatron-core's own provider supplies its modules: norm and linear layer fused before attention and gated MLPs, single
norms elsewhere, one matrix product for all experts of a rank. This backend adds a core attention that takes segments as
this model describes them.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from model.installed import has_fused_weight_gradients, transformer_engine_version
from model.megatron_versions import experts_of
from model.to_device import to_device

# TransformerConfig fields that turn fused kernels on. The kernel for rotary embedding of packed segments is not used,
# because its positions have one axis only.
FUSED_KERNELS: dict[str, Any] = {
    "bias_activation_fusion": True,  # SwiGLU, and in experts its multiplication by the router's probability
    "bias_dropout_fusion": True,
    "gradient_accumulation_fusion": has_fused_weight_gradients(),  # the output layer's needs apex; there is no fallback
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
}


class TransformerEngineSpecProvider(TESpecProvider):
    """megatron-core's provider with the core attention below."""

    description = f"transformer_engine {transformer_engine_version()} (fused norms, linear layers, attention, experts)"
    config_fields = FUSED_KERNELS

    def with_separate_norms(self) -> TransformerEngineSpecProvider:
        """Return the same modules, with no norm fused into a linear layer."""
        return SeparateNorms()

    def core_attention(self) -> type:
        return SegmentDotProductAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool = False
    ) -> tuple[type, Any]:
        """Return class and submodules of the experts, which later versions of megatron-core give as a builder."""
        return experts_of(super().grouped_mlp_modules, moe_use_grouped_gemm)


class SeparateNorms(TransformerEngineSpecProvider):
    """The provider for models with adapters, which need the output of the norm before a linear layer."""

    description = f"{TransformerEngineSpecProvider.description}, norms not fused with linear layers"

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        return None


class SegmentDotProductAttention(TEDotProductAttention):
    """megatron-core's module for Transformer Engine's attention, with segments in the form that its kernels need.

    Their boundaries are on the device and include the padding at the end of each segment, which no useful token of a
    causal segment attends to. The torch backend does the same. If padding between segments were passed on, Transformer
    Engine would exclude FlashAttention, and wait for the device in every layer to compare two lists of boundaries.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: Any,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attend within segments, as `model.attention.SegmentAttention.forward`; return [tokens, heads * head_dim]."""
        assert packed_seq_params is not None, "the model always packs"
        segments = on_device(packed_seq_params, query.device)
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, segments, num_splits)


def on_device(segments: PackedSeqParams, device: Any) -> PackedSeqParams:
    """Return the segments with their boundaries, padding included, on the device.

    The model keeps them in main memory, where rotary embedding reads them. The first layer of a micro-batch makes the
    copy, which is kept with the original.
    """
    if not hasattr(segments, "_on_device"):
        boundaries = segments.cu_seqlens_q if segments.cu_seqlens_q_padded is None else segments.cu_seqlens_q_padded
        boundaries = to_device(boundaries, device)
        segments._on_device = PackedSeqParams(
            qkv_format=segments.qkv_format,
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=segments.max_seqlen_q,
            max_seqlen_kv=segments.max_seqlen_kv,
        )
    return segments._on_device
