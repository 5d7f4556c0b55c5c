"""Which backend is selected, and the errors of a partial or untested installation of Transformer Engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from model.backend import TorchSpecProvider, select_backend
from model.config import ConfigError
from model.transformer_engine import TransformerEngineSpecProvider
from tests.te.fake_ranks import pretended_gpu


def test_transformer_engine_is_selected_if_there_is_a_gpu() -> None:
    with pretended_gpu():
        assert isinstance(select_backend(), TransformerEngineSpecProvider)
        assert isinstance(select_backend("transformer_engine"), TransformerEngineSpecProvider)
        assert isinstance(select_backend("torch"), TorchSpecProvider)
        assert isinstance(select_backend(dtype=torch.float32), TorchSpecProvider)
    assert isinstance(select_backend(), TorchSpecProvider)
    with pytest.raises(ConfigError, match=r"needs a GPU and train.precision=bf16; or set model.backend=auto"):
        select_backend("transformer_engine", torch.float32)


AS_IF_ON_A_GPU = """
import runpy, sys, torch
torch.cuda.is_available = lambda: True
sys.argv = [*{command}]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, r"\(RuntimeError: Found empty `transformer-engine` meta package"),
        ({"NVTE_PROJECT_BUILDING": "1"}, r"\(FileNotFoundError: Could not find shared object file"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["pretrain.train", "--config", "configs/tiny/pretrain.yaml"],
        ["tools.launch", "--config", "configs/tiny/pretrain.yaml", "--nodes", "1"],
        ["tools.view", "batch", "--config", "configs/tiny/pretrain.yaml", "--out", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_partial_installation_is_named(
    command: list[str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    """A new process finds one here: it has no stand-in for the compiled part, and pretends that there is a GPU."""
    command = [str(tmp_path / "page.html") if word == "OUT" else word for word in command]
    done = run_python(AS_IF_ON_A_GPU.format(command=command), environment)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        f"error: Transformer Engine is installed but cannot be imported {message}.*", done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stderr


def test_without_a_gpu_megatron_core_does_not_find_it() -> None:
    """It would use Transformer Engine's Adam and gradient norm, which do not run without a GPU."""
    done = run_python(
        "import model, megatron.core.optimizer as optimizer, megatron.core.models.gpt.gpt_layer_specs as specs; "
        "from model.installed import has_transformer_engine; "
        "print(optimizer.USING_PYTORCH_OPTIMIZER, specs.HAVE_TE, has_transformer_engine())"
    )
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


SELECT = """
import tests.te.stand_in, torch
torch.cuda.is_available = lambda: True
from model.backend import select_backend
print(select_backend("auto", torch.bfloat16, {allow_untested}).description)
"""


def install_other_version(folder: Path, version: str) -> dict[str, str]:
    """Make the environment of a process that finds this version of Transformer Engine, with the present modules."""
    metadata = folder / f"transformer_engine-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
    (metadata.parent / "RECORD").write_text(f"{metadata.parent.name}/METADATA,,\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}


def test_tested_version_is_in_the_description() -> None:
    done = run_python(SELECT.format(allow_untested=False))
    assert done.stdout.startswith(f"transformer_engine {metadata.version('transformer_engine')} ("), done.stderr


def test_untested_version_is_refused_unless_allowed(tmp_path: Path) -> None:
    version = "2.8.1+abc"
    environment = install_other_version(tmp_path, version)
    refused = run_python(SELECT.format(allow_untested=False), environment)
    assert refused.returncode != 0
    assert f"transformer-engine {version} is not tested with this program" in refused.stderr.splitlines()[-1]
    allowed = run_python(SELECT.format(allow_untested=True), environment)
    assert allowed.stdout.startswith(f"transformer_engine {version} ("), allowed.stderr


def run_python(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a new process in the root of the repository, which finds what is installed."""
    inherited = {name: value for name, value in os.environ.items() if name != "NVTE_PROJECT_BUILDING"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=inherited | (environment or {}),
        capture_output=True,
        text=True,
    )
