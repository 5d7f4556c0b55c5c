"""Fixtures: a SLURM of two nodes, and a tiny run whose files the jobs read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.training_data import config_file, shards

__all__ = ["config_file", "shards"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def require_slurm() -> None:
    """Fail where SLURM cannot be started: these tests are part of `make test`."""
    if missing := missing_programs():
        pytest.fail(f"SLURM cannot be started, {', '.join(missing)} missing: run tools/debian.sh as root")
