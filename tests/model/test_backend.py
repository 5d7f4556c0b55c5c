"""The choice of a backend without Transformer Engine (tests/te has the rest), and unsuitable installed packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from model.backend import TorchSpecProvider, select_backend
from model.config import ConfigError
from model.installed import check_transformer_engine_version, refuse_broken_installations

pytestmark = pytest.mark.fast


def test_torch_backend_is_selected_without_transformer_engine() -> None:
    assert isinstance(select_backend(), TorchSpecProvider)
    assert isinstance(select_backend("torch"), TorchSpecProvider)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("transformer_engine", r"needs .*an installed Transformer Engine.*; or set model.backend=auto"),
        ("te", r"model.backend='te': choose one of auto, transformer_engine, torch"),
    ],
)
def test_unavailable_backend_is_refused(choice: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_backend(choice)


@pytest.mark.parametrize("version", ["2.9.0", "2.11.0", "2.11.0+cu13", "2.10.dev1"])
def test_tested_versions_of_transformer_engine_are_accepted(version: str) -> None:
    check_transformer_engine_version(version, allow_untested=False)


@pytest.mark.parametrize("version", ["1.13.0", "2.8.1", "2.12.0", "2.13", "3.9.0", "unknown", ""])
def test_other_versions_of_transformer_engine_are_refused_unless_allowed(version: str) -> None:
    check_transformer_engine_version(version, allow_untested=True)
    with pytest.raises(
        ConfigError, match=r"is not tested .*>=2.9,<2.12.*set model.allow_untested_transformer_engine=true"
    ):
        check_transformer_engine_version(version, allow_untested=False)


def install(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, code: str = "") -> Path:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return package


def test_apex_of_pypi_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "apex", monkeypatch, code="raise SyntaxError('Python 2')")
    with pytest.raises(ConfigError, match=r"apex at .*__init__.py is not NVIDIA's.*pip uninstall apex"):
        refuse_broken_installations()


def test_apex_of_nvidia_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (install(tmp_path, "apex", monkeypatch) / "multi_tensor_apply").mkdir()
    refuse_broken_installations()


def test_transformer_engine_without_a_dependency_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own import ignores that without a message, and so does megatron-core's."""
    monkeypatch.delitem(sys.modules, "transformer_engine")  # model.cpu hides it on a machine without a GPU
    package = install(tmp_path, "transformer_engine", monkeypatch)
    (package / "pytorch.py").write_text("import onnxscript_that_is_not_there")
    with pytest.raises(
        ConfigError, match=r"cannot be imported \(ModuleNotFoundError: No module named 'onnxscript_that"
    ):
        refuse_broken_installations()
