"""Tests that need a GPU: `make test-gpu`. All other tests hide the machine's GPUs.

One GPU is enough. Processes cannot share a GPU under NCCL, so layouts of several processes are tested on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from model.backend import Backend, process_group_arguments, select_backend
from model.installed import has_transformer_engine
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from tests.training_data import config_file, shards  # noqa: F401


def pytest_collection_modifyitems() -> None:
    """Refuse to run without a GPU."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a GPU, and torch finds none here")


@pytest.fixture(autouse=True)
def deterministic_in_this_test_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many runs share this process; `train.deterministic` of one must not reach the next."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product runs
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    """One process, as on CPUs, but under NCCL."""
    torch.cuda.set_device(0)
    dist.init_process_group(**process_group_arguments(0), store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["torch", "transformer_engine"])
def backend_name(request: pytest.FixtureRequest) -> str:
    if request.param == "transformer_engine" and not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    return request.param


@pytest.fixture
def backend(backend_name: str) -> Backend:
    return select_backend(backend_name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each test with its result and seconds, for docs/model.md."""
    table = Table("test", "result", "seconds", title=torch.cuda.get_device_name(0))
    for result in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(result):
            table.add_row(report.nodeid.partition("::")[2], result, f"{report.duration:.1f}")
    Console(width=120).print(table)
