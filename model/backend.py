"""Choose the leaf modules that the layer specs are built from. Nothing else in the model knows the difference.

megatron-core's interface for this is `BackendSpecProvider`: the layer specs of `model.decoder` and `model.vision` ask a
provider for their linear layers, norms, core attention and experts.

    torch                 megatron-core's linear layers, attention and norm in plain torch; CPU and CUDA
    transformer_engine    fused kernels; CUDA. In its own module, which only machines that have it import
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from model.attention import SegmentAttention
from model.config import ConfigError
from model.fp8 import Fp8Config
from model.fp8_emulation import emulated_linear_layers
from model.fp8_rules import Gpu
from model.installed import (
    check_version,
    has_transformer_engine,
    installed_version,
    transformer_engine_version,
)
from model.linear import ColumnGroupedLinear, ColumnLinear, RowGroupedLinear, RowLinear
from model.norm import RMSNorm

BACKENDS = ("auto", "transformer_engine", "torch")

# TransformerConfig fields for which only fused kernels exist.
NO_FUSED_KERNELS: dict[str, Any] = {
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_grouped_gemm": False,
}


class Backend(BackendSpecProvider, Protocol):
    """A provider of modules."""

    description: str  # for the log
    config_fields: dict[str, Any]  # TransformerConfig fields that go with its modules
    has_fp8_kernels: bool  # whether TransformerConfig's fields of FP8 are for it; else FP8 is emulated

    def with_separate_norms(self) -> Backend:
        """Return the same modules, with no norm fused into a linear layer: adapters take the output of the norm."""

    def with_fp8(self, fp8: Fp8Config) -> Backend:
        """Return the modules of layers in FP8; the same where megatron-core tells them so when they run."""


class TorchSpecProvider(BackendSpecProvider):
    """megatron-core's own parallel linear layers, with a norm and a core attention in plain torch."""

    description = "torch (megatron-core's linear layers, torch's attention and norms)"
    config_fields = NO_FUSED_KERNELS
    has_fp8_kernels = False

    def with_separate_norms(self) -> Backend:
        return self

    def with_fp8(self, fp8: Fp8Config) -> Backend:
        return EmulatedFp8SpecProvider(fp8)

    def column_parallel_linear(self) -> type:
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        return RowLinear

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
        # megatron-core's name says Transformer Engine, but only the layers that it is given would need that.
        return TEGroupedMLP, MLPSubmodules(linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear)

    def activation_func(self) -> Any:
        return None


class EmulatedFp8SpecProvider(TorchSpecProvider):
    """The torch backend with linear layers whose FP8 is emulated.

    Args:
        fp8: The recipe, not none.
    """

    def __init__(self, fp8: Fp8Config) -> None:
        self.description = f"{TorchSpecProvider.description}, linear layers in FP8, emulated (recipe {fp8.recipe})"
        self._column, self._row = emulated_linear_layers(fp8)

    def column_parallel_linear(self) -> type:
        return self._column

    def row_parallel_linear(self) -> type:
        return self._row

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        return SequentialMLP, MLPSubmodules(linear_fc1=self._column, linear_fc2=self._row)


def select_backend(choice: str = "auto", dtype: torch.dtype = torch.bfloat16, allow_untested: bool = False) -> Backend:
    """Return the backend that `model.backend` names.

    auto takes Transformer Engine where it is installed, there is a GPU and parameters are bfloat16. With float32 its
    matrix products use TF32, and its fused attention is not available.

    Args:
        choice: One of BACKENDS.
        dtype: dtype of the parameters.
        allow_untested: Accept versions of megatron-core and Transformer Engine that the tests have not run with.

    Raises:
        ConfigError: there is no such backend, Transformer Engine is asked for where it cannot be used, or its version
            or megatron-core's is not tested.
    """
    if choice not in BACKENDS:
        raise ConfigError(f"model.backend={choice!r}: choose one of {', '.join(BACKENDS)}")
    check_version("megatron-core", installed_version("megatron-core"), allow_untested)
    needed = {
        "a GPU": has_gpu(),
        "an installed Transformer Engine (README.md says how)": has_transformer_engine(),
        "train.precision=bf16": dtype == torch.bfloat16,
    }
    lacking = [what for what, present in needed.items() if not present]
    if choice == "torch" or (choice == "auto" and lacking):
        return TorchSpecProvider()
    if lacking:
        raise ConfigError(f"model.backend=transformer_engine needs {' and '.join(lacking)}; or set model.backend=auto")
    check_version("transformer-engine", transformer_engine_version(), allow_untested)
    from model.transformer_engine import TransformerEngineSpecProvider

    return TransformerEngineSpecProvider()


def has_gpu() -> bool:
    """Return whether this process sees a GPU."""
    return torch.cuda.is_available()


def has_fused_adam() -> bool:
    """Return whether megatron-core takes Transformer Engine's FusedAdam here."""
    return has_gpu() and has_transformer_engine()


def gpu() -> Gpu | None:
    """Return what FP8 needs to know of this process's GPU; None without one."""
    if not has_gpu():
        return None
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return Gpu(torch.cuda.get_device_capability(), (int(major), int(minor)))


def device_count() -> int | None:
    """Return the number of GPUs that this process sees; None where the model runs on CPUs."""
    return torch.cuda.device_count() if has_gpu() else None


def process_group_arguments(local_rank: int) -> dict[str, Any]:
    """Return arguments of torch.distributed.init_process_group: NCCL with one GPU per process, or else gloo."""
    if has_gpu():
        return {"backend": "nccl", "device_id": torch.device("cuda", local_rank)}
    return {"backend": "gloo"}
