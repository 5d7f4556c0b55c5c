"""Shared by all tests: the tokenizer, and the rule about skipping."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.demo_tokenizer import train_tokenizer

# What a machine may lack. A skip for any other reason is a test that should have run.
EXCUSES = ("needs a GPU", "needs Transformer Engine")
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
    """A tokenizer folder with GLM's special tokens, trained on a little real text."""
    import pydoc_data.topics

    return train_tokenizer(pydoc_data.topics.topics.values(), tmp_path_factory.mktemp("tokenizer"))
