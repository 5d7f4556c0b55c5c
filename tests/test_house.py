"""Rules about the structure of the project that a change could break without anybody noticing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from demo.records import Library
from demo.records import sources as sources_of_the_demo
from sft.train import SftConfig
from tools import config_keys
from training.config import RunConfig, load_config

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
STANDARD_LIBRARY = set(sys.stdlib_module_names)

# Which of these packages each may import. model and data_pipeline meet in training, through named tensors.
FLOORS = {
    "common": {"common"},
    "data_pipeline": {"common", "data_pipeline"},
    "model": {"common", "model"},
    "training": {"common", "training", "model", "data_pipeline"},
    "rewards": {"common", "rewards"},
    "planning": {"common", "planning", "training", "model", "data_pipeline"},
    "pretrain": {"common", "pretrain", "training", "model", "data_pipeline"},
    "sft": {"common", "sft", "training", "model", "data_pipeline"},
    "rl": {"common", "rl", "rewards", "training", "model", "data_pipeline"},
    "tools": {
        "common",
        "streaming",
        "tools",
        "planning",
        "rl",
        "sft",
        "pretrain",
        "training",
        "model",
        "data_pipeline",
        "rewards",
    },
    "demo": {
        "common",
        "streaming",
        "demo",
        "tools",
        "planning",
        "rl",
        "sft",
        "pretrain",
        "training",
        "model",
        "data_pipeline",
        "rewards",
    },
    "streaming": {"common", "streaming", "model"},
    "benchmarks": {
        "common",
        "benchmarks",
        "demo",
        "rewards",
        "rl",
        "streaming",
        "sft",
        "pretrain",
        "training",
        "model",
        "data_pipeline",
    },
}

# Patterns that may appear in these files only, and why.
FORBIDDEN = {
    r"cuda\.is_available": {"model/backend.py", "model/cpu.py"},  # one place knows about machines without a GPU
    r"(import|from) transformer_engine|find_spec\(.transformer_engine": {"model/installed.py"},
    r"\bTODO\b|\bFIXME\b|\bXXX\b": set(),
    r"NotImplementedError": set(),  # what is not there is an error at start, not at the call
    r"fmt: (skip|off)": set(),  # the formatter decides
    r"pickle\.loads?\(|weights_only=False|torch\.load\(": set(),  # nothing a user brings is unpickled
    r"\byaml\.load\(": set(),
    r"/home/|/root/|/work/|/Users/": set(),
}


# Limits that keep a page readable.
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MODULES = {"data_pipeline": 5, "data_pipeline/inputs": 7}  # beside __init__.py


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level packages that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: write imports in full"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", FLOORS)
def test_package_imports_only_from_the_floors_below(package: str) -> None:
    for path in sources(package):
        above = {name for name in imported(path) if name in FLOORS} - FLOORS[package]
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(above)}, which {package} may not"


def test_product_does_not_import_tests() -> None:
    for path in sources(*FLOORS):
        assert not {"pytest", "tests"} & set(imported(path)), path


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_forbidden_strings(pattern: str) -> None:
    for path in sources(*FLOORS):
        name = str(path.relative_to(ROOT))
        if name not in FORBIDDEN[pattern]:
            found = re.search(pattern, path.read_text())
            assert not found, f"{name} contains {found and found.group()!r}"


def test_no_module_has_the_name_of_a_top_level_folder_or_of_the_standard_library() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    names = folders | STANDARD_LIBRARY
    assert not [path for path in sources(*FLOORS) if path.stem in names and path.parent.parent == ROOT]
    assert not [path for path in sources(*FLOORS) if path.stem in folders]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_imports(path: Path, modules: set[str]) -> Iterator[str]:
    """Yield the modules of this project that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name for name in inner if name in modules)
            if node.module in modules and not all(name in modules for name in inner):
                yield node.module


def test_imports_have_no_circle() -> None:
    paths = {module_name(path): path for path in sources(*FLOORS)}
    graph = {name: set(module_imports(path, set(paths))) - {name} for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_folders_hold_few_modules_and_say_what_belongs_there() -> None:
    for path in sources(*FLOORS):
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} needs a docstring"
    for folder, most in MAX_MODULES.items():
        modules = [path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= most, f"{folder} has {len(modules)} modules: {', '.join(modules)}"


def test_modules_and_functions_are_short() -> None:
    for path in sources(*FLOORS):
        text, name = path.read_text(), path.relative_to(ROOT)
        assert len(text.splitlines()) <= MAX_MODULE_LINES, f"{name} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{node.name} of {name} has {length} lines"


def test_tests_use_public_names_of_the_product() -> None:
    """A name with a leading underscore belongs to its module. Tests go through what the module offers."""
    for path in sources("tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FLOORS:
                private = [name.name for name in node.names if name.name.startswith("_")]
                assert not private, f"{path.relative_to(ROOT)} imports {', '.join(private)} from {node.module}"


def setup_arguments() -> dict[str, Any]:
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def test_package_list_is_complete() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in sources(*FLOORS) if path.name == "__init__.py"}
    assert set(setup_arguments()["packages"]) == found
    holding_modules = {path.parent for path in sources(*FLOORS)}
    assert all((folder / "__init__.py").exists() for folder in holding_modules)


def pins() -> dict[str, str]:
    """Return the pinned version of every package that this Python installs."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {_name(pin): str(pin.specifier).removeprefix("==") for pin in pinned if _is_wanted(pin)}


def _name(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def _is_wanted(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


def test_every_dependency_is_pinned_and_installed_at_that_version() -> None:
    arguments, pinned = setup_arguments(), pins()
    wanted = [
        *arguments["install_requires"],
        *(r for e in ("ray", "gui", "test", "demo") for r in arguments["extras_require"][e]),
    ]
    for requirement in filter(_is_wanted, map(Requirement, wanted)):
        name = _name(requirement)
        assert name in pinned, f"{name} has no version in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"setup.py excludes {name}=={pinned[name]}"
    for name, pin in pinned.items():
        try:
            assert version(name).split("+")[0] == pin, name
        except PackageNotFoundError:
            pytest.fail(f"{name}=={pin} is pinned but not installed: run `make .venv/installed`")


def test_megatron_lm_checkout_on_the_path_is_reported(tmp_path: Path) -> None:
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


def test_python_that_does_not_work_is_refused_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "tools/venv.sh", str(tmp_path / "venv")],
        cwd=ROOT,
        env={**os.environ, "PYTHON": "/nowhere/python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: PYTHON=/nowhere/python is not a working Python 3.11, 3.12 or 3.13\n"
    assert not (tmp_path / "venv").exists()


def test_pages_name_only_files_that_exist() -> None:
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))):
        for name in re.findall(
            r"(?<![\w/])(?:configs|docs|slurm|docker|tools|benchmarks|demo|tests|common|model|data_pipeline|training|pretrain|sft|rl)/[\w./-]*\w",
            page.read_text(),
        ):
            assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{page.name} names {name}"


def test_documentation_has_the_generated_table_of_keys() -> None:
    for path, table in ((config_keys.PAGE, config_keys.table()), (config_keys.RL_PAGE, config_keys.rl_table())):
        page = path.read_text()
        assert page == config_keys.with_table(page, table), "run `make docs`"
    assert page.count("\n| `") > 50


@pytest.mark.parametrize("name", ["pretrain", "long_context", "sft"])
def test_tiny_configurations_are_valid_and_use_sources_of_the_demo(name: str, tmp_path: Path) -> None:
    config = load_config(SftConfig if name == "sft" else RunConfig, ROOT / "configs" / "tiny" / f"{name}.yaml")
    made = {f"demo_out/shards/{source}" for source in sources_of_the_demo(Library(tmp_path))}
    assert {source.path for source in config.data.sources} <= made
    assert not any("held_out" in source.path for source in config.data.sources)


@pytest.mark.parametrize(("reason", "exit_code"), [("not today", 1), ("needs Transformer Engine: its kernels", 0)])
def test_skip_without_an_allowed_reason_fails_the_run(tmp_path: Path, reason: str, exit_code: int) -> None:
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
