"""A Ray cluster of two nodes, and which vLLM servers run on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

LEFT_SECONDS = 90.0  # for servers whose run was killed


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Yield a cluster of two nodes with one CPU each, so that each has room for one server."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short name, because it holds sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster()
        for _ in range(2):
            cluster.add_node(num_cpus=1, include_dashboard=False)
        yield cluster
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def servers_of(folder: Path) -> dict[str, psutil.Process]:
    """Return the processes of vLLM that serve what is in a folder, by their addresses, wherever their parents are."""
    found = {}
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and any(
            str(folder) in each for each in command
        ):
            found[f"http://{command[command.index('--host') + 1]}:{command[command.index('--port') + 1]}"] = process
    return found


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def kill_all(processes: list[psutil.Process]) -> None:
    for each in processes:
        each.kill()
