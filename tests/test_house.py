"""The rules of the house that a reader could break without noticing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from sft.train import SftConfig
from tools import config_keys
from tools.demo_data import Library
from tools.demo_data import sources as sources_of_the_demo
from training.config import RunConfig, load_config

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent

# Which of these packages each may import. model and data_pipeline meet in training, through tensors.
FLOORS = {
    "common": {"common"},
    "data_pipeline": {"common", "data_pipeline"},
    "model": {"common", "model"},
    "training": {"common", "training", "model", "data_pipeline"},
    "pretrain": {"common", "pretrain", "training", "model", "data_pipeline"},
    "sft": {"common", "sft", "training", "model", "data_pipeline"},
    "tools": {"common", "tools", "sft", "pretrain", "training", "model", "data_pipeline"},
    "benchmarks": {"common", "benchmarks", "sft", "pretrain", "training", "model", "data_pipeline"},
}

# Strings that may stand in few places or in none, and why.
FORBIDDEN = {
    r"cuda\.is_available": {"model/backend.py", "model/cpu.py"},  # one place knows about machines without a GPU
    r"(import|from) transformer_engine|find_spec\(.transformer_engine": {"model/installed.py"},
    r"\bTODO\b|\bFIXME\b|\bXXX\b": set(),
    r"NotImplementedError": set(),  # a promise in code is a defect
    r"pickle\.loads?\(|weights_only=False|torch\.load\(": set(),  # nothing a user brings is unpickled
    r"\byaml\.load\(": set(),
    r"/home/|/root/|/work/|/Users/": set(),
}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: write imports in full"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", FLOORS)
def test_a_package_imports_only_from_the_floors_below(package: str) -> None:
    for path in sources(package):
        above = {name for name in imported(path) if name in FLOORS} - FLOORS[package]
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(above)}, which {package} may not"


def test_nobody_imports_the_test_extra() -> None:
    for path in sources(*FLOORS):
        assert not {"pytest", "tests"} & set(imported(path)), path


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_forbidden_strings(pattern: str) -> None:
    for path in sources(*FLOORS):
        name = str(path.relative_to(ROOT))
        if name not in FORBIDDEN[pattern]:
            found = re.search(pattern, path.read_text())
            assert not found, f"{name} contains {found and found.group()!r}"


def test_no_module_bears_the_name_of_a_top_level_folder() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named_alike = [path for path in sources(*FLOORS) if path.stem in folders]
    assert not named_alike


def setup_arguments() -> dict[str, Any]:
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def test_the_package_list_is_complete() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in sources(*FLOORS) if path.name == "__init__.py"}
    assert set(setup_arguments()["packages"]) == found
    holding_modules = {path.parent for path in sources(*FLOORS)}
    assert all((folder / "__init__.py").exists() for folder in holding_modules)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(_normal(line).split("==") for line in lines if line and not line.startswith("#"))


def _normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement.split("==")[0]).lower() + "".join(re.findall(r"==.*", requirement))


def test_every_dependency_is_pinned_and_installed_as_pinned() -> None:
    arguments, pinned = setup_arguments(), pins()
    wanted = [
        *arguments["install_requires"],
        *(r for e in ("ray", "gui", "test", "demo") for r in arguments["extras_require"][e]),
    ]
    for requirement in wanted:
        name = re.split(r"[=<>\[]", _normal(requirement))[0]
        assert name in pinned, f"{name} has no version in constraints.txt"
    for name, pin in pinned.items():
        try:
            assert version(name).split("+")[0] == pin, name
        except PackageNotFoundError:
            pytest.fail(f"{name}=={pin} is pinned but not installed: run `make .venv/installed`")


def test_a_megatron_lm_checkout_on_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").touch()
    (tmp_path / "megatron").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import tools"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} on PYTHONPATH")


def test_the_documentation_names_only_files_that_exist() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name in re.findall(
            r"(?<![\w/])(?:configs|docs|tools|benchmarks|tests|common|model|data_pipeline|training|pretrain|sft)/[\w./-]*\w",
            page.read_text(),
        ):
            assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{page.name} names {name}"


def test_documentation_has_the_generated_table_of_keys() -> None:
    page = config_keys.PAGE.read_text()
    assert page == config_keys.with_table(page), "run `make docs`"
    assert page.count("\n| `") > 50


@pytest.mark.parametrize("name", ["pretrain", "long_context", "sft"])
def test_the_tiny_configurations_are_valid_and_name_sources_that_the_demo_makes(name: str, tmp_path: Path) -> None:
    config = load_config(SftConfig if name == "sft" else RunConfig, ROOT / "configs" / "tiny" / f"{name}.yaml")
    made = {f"demo_out/shards/{source}" for source in sources_of_the_demo(Library(tmp_path))}
    assert {source.path for source in config.data.sources} <= made
    assert not any("held_out" in source.path for source in config.data.sources)


@pytest.mark.parametrize(("reason", "exit_code"), [("not today", 1), ("needs Transformer Engine: its kernels", 0)])
def test_a_skip_without_an_excuse_fails_the_run(tmp_path: Path, reason: str, exit_code: int) -> None:
    (tmp_path / "test_skipped.py").write_text(
        f"import pytest\n\ndef test_passes():\n    pass\n\ndef test_skips():\n    pytest.skip({reason!r})\n"
    )
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-p", "tests.conftest", "--forbid-skips", "-c", "pyproject.toml"), tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == exit_code, done.stdout
    assert reason in done.stdout
    assert ("skipped, but should have run" in done.stdout) == bool(exit_code)
