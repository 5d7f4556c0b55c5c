"""Lets Transformer Engine's Python be imported without its compiled part: a pytest plugin, `-p tests.te.stand_in`.

The modules are the real ones, with their real parameters, names and attributes; they can be built, saved and loaded,
and compute nothing: every call into the compiled part raises. This has to be imported before megatron-core, which looks
for Transformer Engine but once.
"""

from __future__ import annotations

import os
import sys
import warnings
from types import ModuleType
from typing import Any


class Kernel:
    """Any name of the compiled part: a function that does not run, or an enumeration of which only names are used."""

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


class CompiledPart(ModuleType):
    """Stands for the extension module `transformer_engine_torch`."""

    __all__ = ("get_cudnn_version",)  # what `import *` brings

    @staticmethod
    def get_cudnn_version() -> int:
        """Asked for when attention is built."""
        return 91400

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kernel(f"{self.__name__}.{name}")


def install() -> None:
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for CUDA's libraries
    sys.modules["transformer_engine_torch"] = CompiledPart("transformer_engine_torch")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Detected a PyTorch installation but could not find the shared object"
        )
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch


install()
