"""Which backend is taken, and what is said where Transformer Engine is installed and not whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.backend import TorchSpecProvider, select_backend
from model.config import ConfigError
from model.transformer_engine import TransformerEngineSpecProvider
from tests.te.fake_ranks import pretended_gpu


def test_transformer_engine_is_taken_where_there_is_a_gpu() -> None:
    with pretended_gpu():
        assert isinstance(select_backend(), TransformerEngineSpecProvider)
        assert isinstance(select_backend("transformer_engine"), TransformerEngineSpecProvider)
        assert isinstance(select_backend("torch"), TorchSpecProvider)
        assert isinstance(select_backend(dtype=torch.float32), TorchSpecProvider)
    assert isinstance(select_backend(), TorchSpecProvider)
    with pytest.raises(ConfigError, match=r"needs a GPU and train.precision=bf16; or set model.backend=auto"):
        select_backend("transformer_engine", torch.float32)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, r"\(RuntimeError: Found empty `transformer-engine` meta package"),
        ({"NVTE_PROJECT_BUILDING": "1"}, r"\(FileNotFoundError: Could not find shared object file"),
    ],
)
def test_partial_installation_is_reported(environment: dict[str, str], message: str) -> None:
    """A new process finds half an installation here: the compiled part is missing, and it believes it has a GPU."""
    done = run_python("import torch; torch.cuda.is_available = lambda: True; import model", environment)
    assert done.returncode != 0
    last_line = done.stderr.splitlines()[-1]
    assert re.match(
        f"model.config.ConfigError: Transformer Engine is installed but cannot be imported {message}", last_line
    )


def test_without_a_gpu_megatron_core_does_not_find_it() -> None:
    """Whole or not: its Adam and its gradient norm would be taken, and do not run."""
    done = run_python(
        "import model, megatron.core.optimizer as optimizer, megatron.core.models.gpt.gpt_layer_specs as specs; "
        "from model.installed import has_transformer_engine; "
        "print(optimizer.USING_PYTORCH_OPTIMIZER, specs.HAVE_TE, has_transformer_engine())"
    )
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def run_python(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A new process from the repository's root, which finds what is installed."""
    inherited = {name: value for name, value in os.environ.items() if name != "NVTE_PROJECT_BUILDING"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=inherited | (environment or {}),
        capture_output=True,
        text=True,
    )
