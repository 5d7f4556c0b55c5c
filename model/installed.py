"""Check what is installed, before megatron-core imports whatever it finds.

megatron_core        A version outside the tested range may compute something else, without a message.
transformer_engine   NVIDIA's fused kernels. A partial installation breaks megatron-core, or is silently ignored where
                     only a dependency is missing. For its version the same holds as for megatron-core's.
apex                 NVIDIA's older kernels. PyPI has an unrelated package of that name, which megatron-core would take
                     for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from importlib import metadata
from pathlib import Path

from model.errors import ConfigError

# Versions that the tests have run with: from the first, below the second. setup.py says the same.
TESTED = {
    "megatron-core": ((0, 16), (0, 20)),
    "transformer-engine": ((2, 9), (2, 21)),
}


def has_transformer_engine() -> bool:
    """Return whether a package of this name can be found, complete or not."""
    return importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_version() -> str:
    """Return the installed version, such as "2.11.0", or "unknown" if nothing says it."""
    return installed_version("transformer-engine")


def installed_version(package: str) -> str:
    """Return the version of a package, or "unknown" if it is not installed as one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def tested_range(package: str) -> str:
    """Return the tested versions of a package of TESTED, as pip writes them."""
    first, end = TESTED[package]
    return f">={first[0]}.{first[1]},<{end[0]}.{end[1]}"


def check_version(package: str, version: str, allow_untested: bool) -> None:
    """Check that the tests have run with the version of a package of TESTED.

    Other versions may be wrong without a message. From 2.13 on, for example, Transformer Engine does not mark the
    weights of experts as split over tensor ranks, which megatron-core's gradient norm relies on.

    Raises:
        ConfigError: they have not, and `allow_untested` is false.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    first, end = TESTED[package]
    if allow_untested or (found and first <= (int(found[1]), int(found[2])) < end):
        return
    without = " or set model.backend=torch," if package == "transformer-engine" else ""
    raise ConfigError(
        f"{package} {version} is not tested with this program (tested: {tested_range(package)}); install a tested one,"
        f"{without} or set model.allow_untested_versions=true and compare the first losses and gradient norms of a run "
        "with those of a tested version"
    )


def describe_versions(transformer_engine: bool) -> str:
    """Return the versions that a run stands on, and which of them are tested.

    Args:
        transformer_engine: Whether the run uses it.
    """
    used = ["megatron-core", *(["transformer-engine"] if transformer_engine else [])]
    tested = [f"{package} {installed_version(package)} (tested: {tested_range(package)})" for package in used]
    others = [f"{package} {installed_version(package)}" for package in ("torch", "transformers")]
    return ", ".join([*tested, *others])


def has_fused_weight_gradients() -> bool:
    """Return whether NVIDIA apex was built with the kernel that adds weight gradients into the gradient buffer."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def refuse_broken_installations() -> None:
    """Check for installations with which megatron-core would fail with a misleading message, or with none.

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
            "megatron-core would take it for NVIDIA's; pip uninstall apex"
        )
