"""Fixtures: a SLURM of two nodes, and a tiny run whose files the jobs read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, require_slurm
from tests.training_data import config_file, shards

__all__ = ["config_file", "shards"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
