"""Fixtures: a tiny model in several files, the service that serves it, and processes that know where the service is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hf_folders import save_whole_folder
from tests.model.test_hf_weights import sharded_copy
from tests.processes import Processes
from tests.training_data import config_file, shards
from tests.urls.hub_server import HubServer
from tests.urls.s3_server import S3Server

__all__ = ["config_file", "shards"]

Service = S3Server | HubServer
SERVICES: dict[str, type[S3Server] | type[HubServer]] = {"s3": S3Server, "hf": HubServer}
CLIENTS = ("rank0", "rank1", "user")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of transformers, cut into shards."""
    root = tmp_path_factory.mktemp("saved")
    whole = save_whole_folder("glm4v_moe", root / "whole")
    folder = sharded_copy(whole, root / "tiny", 3_000_000)
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module", params=SERVICES)
def service(request: pytest.FixtureRequest, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of a copy of the folder, which its address in the environment names."""
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("served") / "tiny"))
    with SERVICES[request.param](folder, CLIENTS) as serving, pytest.MonkeyPatch.context() as environment:
        for name, value in serving.anonymous().items():
            environment.setenv(name, value)
        yield serving


@pytest.fixture(scope="module")
def ranks(service: Service) -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes
