"""What is installed beside megatron-core, looked at before megatron-core is imported: it takes whatever it finds.

transformer_engine   NVIDIA's fused kernels. Half of an installation takes megatron-core down with it, or, where
                     only a dependency is missing, is ignored in silence.
apex                 NVIDIA's older kernels. PyPI has an unrelated package of that name, which megatron-core takes
                     for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from model.config import ConfigError


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def has_fused_weight_gradients() -> bool:
    """Whether NVIDIA apex was built with the kernel that adds weight gradients into the gradient buffer."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def refuse_broken_installations() -> None:
    """Say what is wrong where megatron-core would fail with another message, or with none.

    Raises:
        ConfigError: Transformer Engine is installed and cannot be imported, or the `apex` found is not NVIDIA's.
    """
    if has_transformer_engine():
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:  # RuntimeError, FileNotFoundError, AssertionError or ImportError, by what is missing
            reason = f"{type(error).__name__}: {error}".split(". ")[0]
            raise ConfigError(
                f"Transformer Engine is installed but cannot be imported ({reason}); install all of it beside a CUDA "
                'torch (pip install --no-build-isolation -e ".[te]") or none of it (pip uninstall transformer-engine '
                "transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13)"
            ) from error
    apex = importlib.util.find_spec("apex")
    if apex is not None and not any(
        (Path(folder) / "multi_tensor_apply").is_dir() for folder in apex.submodule_search_locations or ()
    ):
        raise ConfigError(
            f"the package apex at {apex.origin} is not NVIDIA's (PyPI's package of that name is an unrelated one), and "
            "megatron-core would take it for that; pip uninstall apex"
        )
