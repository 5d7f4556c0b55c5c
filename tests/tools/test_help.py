"""The help of every command comes at once: what takes seconds to import is imported by what a command does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.launch import ROOT

SLOW_TO_IMPORT = {"torch", "megatron", "transformers", "scipy", "matplotlib", "pyarrow", "av"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield the names of the modules that users may call, and their syntax trees."""
    for folder in ("tools", "demo", "pretrain", "sft", "rl", "rewards"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__main__").removesuffix(".__init__"), ast.parse(path.read_text())


def is_run(tree: ast.Module) -> bool:
    """Return whether a module does something when it is called: if __name__ == "__main__"."""
    tests = (ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If))
    return any(test == "__name__ == '__main__'" for test in tests)


# rewards.workers starts the one, rl.engines.ray_servers the other.
NOT_FOR_USERS = ("rewards.symbolic_server", "rl.engines.ray_driver")
COMMANDS = [name for name, tree in modules() if is_run(tree) and name not in NOT_FOR_USERS]


def help_of(*words: str) -> tuple[str, set[str]]:
    """Return the help of a command or sub-command, and the packages that take seconds among those that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = re.findall(r"^import time: .*\| +(\w+)", done.stderr, re.MULTILINE)
    assert "typer" in imported
    assert re.search(rf"^ *Usage: python -m {' '.join(words)} ", done.stdout, re.MULTILINE), done.stdout
    return done.stdout, SLOW_TO_IMPORT & set(imported)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_package_that_takes_seconds(command: str) -> None:
    shown, slow = help_of(command)
    assert not slow
    for name in sub_commands(shown):
        _, slow = help_of(command, name)
        assert not slow, name


def sub_commands(shown: str) -> list[str]:
    """Return the names that a help lists below "Commands:"."""
    _, _, listed = shown.partition("\nCommands:\n")
    names = re.findall(r"^  ([\w-]+)", listed, re.MULTILINE)
    assert bool(names) == bool(re.search(r"Usage: .* COMMAND", shown))
    return names


def test_module_that_is_described_as_a_command_is_one() -> None:
    described = [name for name, tree in modules() if re.search(rf"-m {name}(?![.\w])", ast.get_docstring(tree) or "")]
    assert len(described) > 10
    assert set(described) <= {*COMMANDS, *NOT_FOR_USERS}
