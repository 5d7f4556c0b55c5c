"""The language decoder as megatron-core layer specs: GLM-4.5-Air's mixture of experts and the dense GLM-4-9B.

GLM-4.5V, a plain pre-norm layer:           GLM-4.1V, with a norm after each sub-layer too ("sandwich"):

    x += attention(input_layernorm(x))          x += post_self_attn_layernorm(attention(input_layernorm(x)))
    x += mlp(pre_mlp_layernorm(x))              x += post_mlp_layernorm(mlp(pre_mlp_layernorm(x)))

megatron-core has no slot for a norm between a sub-layer and its residual. Its slot "bias, dropout, add" holds it here.

A backend may fuse a norm with the linear layer after it. The norm before attention is then part of linear_qkv, and the
norm before a gated MLP part of linear_fc1. The norm before a mixture of experts stays a module, because the router, the
routed and the shared experts all read its output. Checkpoints have the same names in both cases (FUSED_NORMS).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from model.backend import Backend
from model.config import DecoderConfig
from model.fp8 import Fp8Config
from model.megatron_versions import NO_CUDA_GRAPHS
from model.moe import SegmentMoELayer, SegmentRouter


def decoder_transformer_config(
    decoder: DecoderConfig,
    *,
    dtype: torch.dtype,
    balance_loss_coeff: float = 0.0,
    expert_bias_update_rate: float = 0.0,
    dispatcher: str = "alltoall",
    shared_expert_overlap: bool = False,
    **fields: Any,
) -> TransformerConfig:
    """Return megatron-core's configuration of the decoder.

    Args:
        decoder: Sizes of the decoder.
        dtype: Dtype of the parameters.
        balance_loss_coeff: Weight of the sequence-level balance loss (report: 1e-4).
        expert_bias_update_rate: Step size of the loss-free balancing (report: 1e-3).
        dispatcher: What sends tokens to experts (model.dispatch).
        shared_expert_overlap: Compute the shared expert while tokens travel.
        fields: The parallel layout and the backend's switches, as `TransformerConfig` names them.
    """
    if decoder.is_moe:
        fields |= {
            "num_moe_experts": decoder.n_routed_experts,
            "moe_layer_freq": [int(decoder.is_moe_layer(n)) for n in range(decoder.num_hidden_layers)],
            "moe_ffn_hidden_size": decoder.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": decoder.moe_intermediate_size * decoder.n_shared_experts,
            "moe_router_topk": decoder.num_experts_per_tok,
            "moe_router_score_function": "sigmoid",
            "moe_router_topk_scaling_factor": decoder.routed_scaling_factor,
            "moe_router_dtype": "fp32",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": expert_bias_update_rate,
            "moe_router_load_balancing_type": "none",  # SegmentRouter adds the balance loss itself
            "moe_aux_loss_coeff": balance_loss_coeff,
            "moe_token_dispatcher_type": dispatcher,
            "moe_shared_expert_overlap": shared_expert_overlap,
        }
    return TransformerConfig(
        num_layers=decoder.num_hidden_layers,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.intermediate_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_key_value_heads,
        kv_channels=decoder.head_dim,
        mrope_section=list(decoder.mrope_section),
        rotary_interleaved=not decoder.is_moe,
        add_qkv_bias=True,
        **glm_transformer_fields(decoder.rms_norm_eps, dtype),
        **fields,
    )


def glm_transformer_fields(rms_norm_eps: float, dtype: torch.dtype) -> dict[str, Any]:
    """Return the TransformerConfig fields that the decoder, the vision tower and the adapter share."""
    return {
        "normalization": "RMSNorm",
        "layernorm_epsilon": rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        **NO_CUDA_GRAPHS,
        "bf16": dtype == torch.bfloat16,
        # model.weights.load.load_weights fills all weights later.
        "init_method": _leave_uninitialised,
        "output_layer_init_method": _leave_uninitialised,
    }


def _leave_uninitialised(weight: Tensor) -> None:
    pass


def decoder_block_spec(
    decoder: DecoderConfig,
    config: TransformerConfig,
    backend: Backend,
    vp_stage: int | None,
    fp8: Fp8Config,
) -> TransformerBlockSubmodules:
    """Return the specs of this pipeline stage's decoder layers and of the final norm.

    Args:
        decoder: Sizes of the decoder.
        config: From `decoder_transformer_config`.
        backend: Provider of the leaf modules.
        vp_stage: Which of this rank's virtual pipeline stages; None if it has one stage.
        fp8: Which layers compute in FP8.
    """
    norm = backend.layer_norm(rms_norm=True)
    sandwich = ModuleSpec(module=NormThenAdd, params={"config": config, "norm": norm})
    add = get_bias_dropout_add if decoder.is_moe else sandwich
    first = get_transformer_layer_offset(config, vp_stage)
    layers = []
    for number in range(first, first + get_num_layers_to_build(config, vp_stage)):
        modules = backend.with_fp8(fp8) if fp8.covers_layer(number, decoder.num_hidden_layers) else backend
        moe = _moe_spec(config, modules) if decoder.is_moe_layer(number) else None
        layers.append(layer_spec(modules, AttnMaskType.causal, add=add, moe=moe))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


# Names of the norms before attention and MLP: fused into the next linear layer, and as modules. Checkpoints and
# model.weights.table use the latter.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def layer_spec(
    backend: BackendSpecProvider,
    attn_mask_type: AttnMaskType,
    *,
    moe: ModuleSpec | None = None,
    add: Any = get_bias_dropout_add,
) -> ModuleSpec:
    """Return the spec of a pre-norm layer of the decoder or the vision tower.

    Args:
        backend: Provider of the leaf modules.
        attn_mask_type: `causal`, or `no_mask` for full attention within a segment.
        moe: Spec of a mixture of experts that replaces the gated MLP.
        add: Module that adds the output of a sub-layer to its input.
    """
    norm = backend.layer_norm(rms_norm=True)
    fused = backend.fuse_layernorm_and_linear()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=_self_attention_spec(backend, attn_mask_type),
            self_attn_bda=add,
            pre_mlp_layernorm=IdentityOp if fused and moe is None else norm,
            mlp=moe or ModuleSpec(module=MLP, submodules=mlp_submodules(backend, _linear_after_norm(backend))),
            mlp_bda=add,
            sharded_state_dict_keys_map=FUSED_NORMS if fused else {},
        ),
    )


def _linear_after_norm(backend: BackendSpecProvider) -> type:
    return backend.column_parallel_layer_norm_linear() or backend.column_parallel_linear()


def _self_attention_spec(backend: BackendSpecProvider, attn_mask_type: AttnMaskType) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": attn_mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=_linear_after_norm(backend),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
        ),
    )


def mlp_submodules(backend: BackendSpecProvider, linear_fc1: type) -> MLPSubmodules:
    """Return the linear layers of a gated MLP; `linear_fc1` may include the norm before it."""
    return MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=backend.row_parallel_linear())


def _moe_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    experts, submodules = backend.grouped_mlp_modules(config.moe_grouped_gemm, False)
    return ModuleSpec(
        module=SegmentMoELayer,
        submodules=MoESubmodules(
            router=SegmentRouter,
            experts=ModuleSpec(module=experts, submodules=submodules),
            shared_experts=ModuleSpec(
                module=SharedExpertMLP, submodules=mlp_submodules(backend, backend.column_parallel_linear())
            ),
        ),
    )


class NormThenAdd(nn.Module):
    """residual + norm(sub-layer output), for the slot of megatron-core's bias-dropout-add."""

    def __init__(self, config: TransformerConfig, norm: type) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self, training: bool, fused: bool
    ) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float | None], Tensor]:
        """Return the function that megatron-core calls with (output, bias), residual and dropout probability."""

        def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _: float | None) -> Tensor:
            output, bias = output_and_bias
            assert bias is None, "GLM's linear layers have no bias to add after a sub-layer"
            return residual + self.norm(output)

        return add
