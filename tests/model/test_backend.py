"""Backends without Transformer Engine (tests/te has the rest), and packages that megatron-core mistakes for others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from model.backend import TorchSpecProvider, select_backend
from model.config import ConfigError
from model.installed import refuse_broken_installations

pytestmark = pytest.mark.fast


def test_the_torch_backend_is_taken_without_transformer_engine() -> None:
    assert isinstance(select_backend(), TorchSpecProvider)
    assert isinstance(select_backend("torch"), TorchSpecProvider)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("transformer_engine", r"needs .*an installed Transformer Engine.*; or set model.backend=auto"),
        ("te", r"model.backend='te': choose one of auto, transformer_engine, torch"),
    ],
)
def test_a_backend_that_cannot_be_is_refused(choice: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_backend(choice)


def install(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, code: str = "") -> Path:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return package


def test_the_apex_of_pypi_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "apex", monkeypatch, code="raise SyntaxError('Python 2')")
    with pytest.raises(ConfigError, match=r"apex at .*__init__.py is not NVIDIA's.*pip uninstall apex"):
        refuse_broken_installations()


def test_the_apex_of_nvidia_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (install(tmp_path, "apex", monkeypatch) / "multi_tensor_apply").mkdir()
    refuse_broken_installations()


def test_a_transformer_engine_that_lacks_a_dependency_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own import ignores that in silence, and so does megatron-core's."""
    monkeypatch.delitem(sys.modules, "transformer_engine")  # where a machine without a GPU says that there is none
    package = install(tmp_path, "transformer_engine", monkeypatch)
    (package / "pytorch.py").write_text("import onnxscript_that_is_not_there")
    with pytest.raises(
        ConfigError, match=r"cannot be imported \(ModuleNotFoundError: No module named 'onnxscript_that"
    ):
        refuse_broken_installations()
