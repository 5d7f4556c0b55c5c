"""Which leaf modules the specs are built from. Nothing else in the model knows the difference between backends.

megatron-core's seam for this is `BackendSpecProvider`: the layer specs of `model.decoder` and `model.vision` ask a
provider for their linear layers, norms, core attention and experts.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from model.attention import SegmentAttention
from model.config import ConfigError
from model.norm import RMSNorm

# TransformerConfig fields for which only fused kernels exist.
NO_FUSED_KERNELS: dict[str, Any] = {
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_grouped_gemm": False,
}


class TorchSpecProvider(BackendSpecProvider):
    """megatron-core's own parallel linear layers, with a norm and a core attention in plain torch."""

    description = "torch (megatron-core's linear layers, torch's attention and norms)"
    config_fields = NO_FUSED_KERNELS

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return SegmentAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def activation_func(self) -> Any:
        return None


def select_backend() -> TorchSpecProvider:
    """The backend of this machine."""
    return TorchSpecProvider()


def process_group_arguments(local_rank: int) -> dict[str, Any]:
    """How torch.distributed.init_process_group joins processes here: NCCL between GPUs, one a process, or gloo."""
    if torch.cuda.is_available():
        return {"backend": "nccl", "device_id": torch.device("cuda", local_rank)}
    return {"backend": "gloo"}


def require_fp8(recipe: str) -> None:
    """Refuse FP8 where it would silently train unquantised. megatron-core 0.16.1 does so for dense models, and dies
    with a TypeError for mixtures of experts.

    Raises:
        ConfigError: FP8 is asked for; it needs Transformer Engine's linear layers, which this backend has not.
    """
    if recipe == "none":
        return
    installed = importlib.util.find_spec("transformer_engine") is not None
    state = "is installed but not used by the torch backend" if installed else "is not installed"
    raise ConfigError(
        f"fp8.recipe={recipe} needs the linear layers of Transformer Engine, which {state}; set fp8.recipe=none "
        "and train.precision=bf16"
    )
