"""Shared by all tests: the tokenizer, pairs of equal models (ours and transformers'), and the rule about skipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from demo.tokenizer import train_tokenizer
from model.glmv import GlmvModel
from model.weights.load import SafetensorsFolder
from model.whole_model import build_whole_model
from tests import prose
from tests.hf_folders import VARIANTS
from tests.process_group import alone
from tests.processes import Processes
from tests.reference import save_transformers_model, small_config

# What a machine may lack. A skip for any other reason is a test that should have run.
EXCUSES = ("needs Transformer Engine",)
UNEXCUSED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--forbid-skips", action="store_true", help=f"fail on a skip whose reason is none of {EXCUSES}")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[UNEXCUSED] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(EXCUSES):
            item.config.stash[UNEXCUSED].append(f"{item.nodeid}: {reason}")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash[UNEXCUSED] and session.config.getoption("--forbid-skips"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[UNEXCUSED] and config.getoption("--forbid-skips"):
        terminalreporter.section("skipped, but should have run")
        for line in config.stash[UNEXCUSED]:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder with GLM's special tokens, trained on the tests' own text."""
    return train_tokenizer(prose.paragraphs(), tmp_path_factory.mktemp("tokenizer"))


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process() -> Iterator[Processes]:
    with Processes(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def four_processes() -> Iterator[Processes]:
    with Processes(4) as processes:
        yield processes


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture(scope="session", params=VARIANTS)
def hf_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A Hugging Face folder written by transformers, and its model."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_transformers_model(small_config(request.param), folder)


@pytest.fixture
def reference(hf_folder: tuple[Path, nn.Module]) -> nn.Module:
    model = hf_folder[1]
    model.zero_grad()
    return model


@pytest.fixture
def build(single_process: None, hf_folder: tuple[Path, nn.Module]) -> Callable[..., GlmvModel]:
    """Return a function that builds our model with the reference's weights."""
    folder, reference = hf_folder
    config: Any = reference.config

    def make(**options: Any) -> GlmvModel:
        return build_whole_model(small_config(config.model_type), SafetensorsFolder(folder), **options)

    return make


@pytest.fixture
def model(build: Callable[..., GlmvModel]) -> GlmvModel:
    return build().eval()
