"""The choice of a backend without Transformer Engine (tests/te has the rest), and unsuitable installed packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from model.backend import TorchSpecProvider, select_backend
from model.config import ConfigError
from model.installed import check_version, describe_versions, refuse_broken_installations
from training.config import ModelChoice, RunConfig

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


@pytest.mark.parametrize(
    ("package", "version"),
    [
        *(("transformer-engine", version) for version in ("2.9.0", "2.11.0+cu13", "2.10.dev1", "2.13", "2.20.2")),
        *(("megatron-core", version) for version in ("0.16.1", "0.17.0", "0.18.2rc1", "0.19.2")),
    ],
)
def test_tested_versions_are_accepted(package: str, version: str) -> None:
    check_version(package, version, allow_untested=False)


@pytest.mark.parametrize(
    ("package", "version", "tested"),
    [
        *(("transformer-engine", v, ">=2.9,<2.21") for v in ("1.13.0", "2.8.1", "2.21.0", "3.9.0", "unknown", "")),
        *(("megatron-core", v, ">=0.16,<0.20") for v in ("0.15.3", "0.20.0rc0", "1.16.1", "unknown")),
    ],
)
def test_other_versions_are_refused_unless_allowed(package: str, version: str, tested: str) -> None:
    check_version(package, version, allow_untested=True)
    message = rf"{package} .*is not tested .*{tested}.*set model.allow_untested_versions=true"
    with pytest.raises(ConfigError, match=message):
        check_version(package, version, allow_untested=False)


def test_untested_megatron_core_is_refused_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "megatron_core-0.20.0.dist-info" / "METADATA"
    installed.parent.mkdir()
    installed.write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.20.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = ModelChoice(preset="tiny_moe", backend="torch")
    with pytest.raises(ConfigError, match=r"megatron-core 0.20.0 is not tested"):
        RunConfig(model=model).select_backend()
    model.allow_untested_versions = True
    RunConfig(model=model).select_backend()
    assert describe_versions(transformer_engine=False).startswith("megatron-core 0.20.0 (tested: >=0.16,<0.20), torch ")


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
