"""Import Transformer Engine's Python without its compiled part: a pytest plugin, `-p tests.te.stand_in`.

The modules are the real ones, with their real parameters, names and attributes. They can be built, saved and loaded,
but compute nothing: every call into the compiled part raises. This must be imported before megatron-core, which looks
for Transformer Engine only once.
"""

from __future__ import annotations

import os
import sys
import warnings
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# The version of the modules; a test may lay the metadata of another one over it.
INSTALLED = next(
    found
    for found in metadata.distributions(name="transformer_engine")
    if Path(str(found.locate_file("transformer_engine"))).is_dir()
)
VERSION = tuple(int(number) for number in INSTALLED.version.split(".")[:2])


class Kernel:
    """Any name of the compiled part: a function that does not run, or an enumeration whose names alone are used."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kernel(f"{self.name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"{self.name} needs a GPU")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kernel) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __int__(self) -> int:
        return abs(hash(self.name))


class CompiledPart(ModuleType):
    """A stand-in for the extension module `transformer_engine_torch`."""

    # Indices of a module's quantisers.
    FP8FwdTensors = IntEnum(
        "FP8FwdTensors",
        "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT "
        "GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
        start=0,
    )
    FP8BwdTensors = IntEnum(
        "FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3", start=0
    )

    __all__ = ("get_cudnn_version",)  # what `import *` imports

    # Transformer Engine makes enumerations of its own of the numbers of these, since 2.17 and 2.19.
    if VERSION >= (2, 17):
        DType = IntEnum("DType", "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1")
    if VERSION >= (2, 19):
        NVTE_Fused_Attn_Backend = IntEnum(
            "NVTE_Fused_Attn_Backend", "NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend"
        )

    @staticmethod
    def get_cudnn_version() -> int:
        """Return a version, which is needed to build attention."""
        return 91400

    if VERSION >= (2, 19):

        @staticmethod
        def create_empty_quantized_tensor(
            quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, _: bool
        ) -> Any:
            """Return the tensor that Transformer Engine's Python can make, too, without the compiled part."""
            inner, form = quantizer.alloc_tensors(shape, device=device), quantizer.create_metadata(shape, dtype=dtype)
            strides = torch.empty(shape, device="meta").stride()
            return form["cls"].__tensor_unflatten__(inner, form, torch.Size(shape), strides)

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kernel(f"{self.__name__}.{name}")


def install() -> None:
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for the libraries of CUDA
    sys.modules["transformer_engine_torch"] = CompiledPart("transformer_engine_torch")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Detected a PyTorch installation but could not find the shared object"
        )
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch


install()
