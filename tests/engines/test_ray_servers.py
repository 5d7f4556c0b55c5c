"""vLLM servers on the two nodes of a Ray cluster: they draw, are lost, come back, and end with the run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from rl.engines.ray_servers import RayServer, check_cluster
from rl.engines.vllm import VllmServer
from rl.errors import EngineError
from tests.engines.engine_folders import ENGINES, ROOT, exported_folder
from tests.engines.ray_cases import LEFT_SECONDS, family, kill_all, servers_of, two_nodes
from tests.engines.rollout_cases import (
    MAX_LENGTH,
    OPTIONS,
    SAMPLING,
    TOLERANCE,
    gap,
    image_prompts,
    make_engine,
    requests_of,
)
from tests.model.layout_cases import make_trainer

pytestmark = pytest.mark.timeout(2400)  # servers start one after another, and machines may be busy

RUN = """
import json, sys, time
from pathlib import Path
from rl.engines.ray_servers import RayServer
server = RayServer(*[Path(each["path"]) if isinstance(each, dict) else each for each in json.loads(sys.argv[1])])
server.wait(400.0, lambda: None)
print(server.server.address, flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_folder("GLM-4.1V", tokenizer_folder, tmp_path_factory.mktemp("model"))


def node_of(process: psutil.Process) -> int:
    """Return the process of the Ray node on which a server runs."""
    return next(each.pid for each in process.parents() if each.name() == "raylet")


def test_servers_on_two_nodes_draw_and_come_back(
    cluster: Cluster, folder: Path, single_process: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, prompts = make_trainer("glm4v", str(folder), ""), image_prompts("glm4v", folder)
    options = {"start": 2, "ray": cluster.address, "publish_dir": str(tmp_path / "shared"), "health_seconds": 10.0}
    engine = make_engine("glm4v", folder, tmp_path / "run", deadline=600.0, concurrency=16, **options)
    try:
        engine.publish(trainer, 0)
        servers = servers_of(tmp_path)
        assert len(servers) == 2
        assert len({node_of(process) for process in servers.values()}) == 2
        assert all(VllmServer(address).is_healthy(10.0) for address in servers)
        assert len(list((tmp_path / "shared").glob("run-*/servers/[01].log"))) == 2

        address, process = next(iter(servers.items()))
        killer = threading.Timer(1.5, kill_all, args=(family(process),))
        killer.start()
        rollouts = engine.generate(requests_of(prompts, 1, group=6), SAMPLING)
        killer.join()
        assert len(rollouts) == 6 * len(prompts)
        assert gap(trainer, prompts, rollouts[::6])[0] <= TOLERANCE

        engine.publish(trainer, 1)
        again = servers_of(tmp_path)
        assert len(again) == 2
        assert address not in again
        assert len({node_of(process) for process in again.values()}) == 2
        rollouts = engine.generate(requests_of(prompts, 2), SAMPLING)
        assert {each.version for each in rollouts} == {1}
        assert gap(trainer, prompts, rollouts[::4])[0] <= TOLERANCE

        # A node ends: its server too, and there is no room for it elsewhere.
        lost = next(process for process in again.values() if node_of(process) == _raylet(cluster.list_all_nodes()[1]))
        processes = family(lost)
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        assert not psutil.wait_procs(processes, timeout=LEFT_SECONDS)[1]
        engine.publish(trainer, 2)
        assert len(servers_of(tmp_path)) == 1
        # Ray finds no room, or has placed it on the node that it does not know to be lost.
        assert "rollouts: a server could not be started again (rollout.ray=" in caplog.text
        rollouts = engine.generate(requests_of(prompts[:4], 3), SAMPLING)
        assert {each.version for each in rollouts} == {2}
        print(caplog.messages)
    finally:
        cluster.add_node(num_cpus=1)
        processes = [each for server in servers_of(tmp_path).values() for each in family(server)]
        engine.close()
    assert processes
    assert not psutil.wait_procs(processes, timeout=LEFT_SECONDS)[1]


def _raylet(node) -> int:
    (found,) = node.all_processes["raylet"]
    return found.process.pid


@pytest.mark.parametrize("killed", ["the run", "the run and the driver"])
def test_servers_end_when_processes_of_the_run_are_killed(
    killed: str, cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    """Nothing of vLLM is left, also where it is stopped and hears no signal but the last."""
    served = shutil.copytree(folder, tmp_path / "served")
    log = {"path": str(tmp_path / "logs/0.log")}
    given = [cluster.address, 1, str(ENGINES), {"path": str(served)}, MAX_LENGTH, OPTIONS, log, 60.0]
    command = [sys.executable, "-c", RUN, json.dumps(given)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        address = run.stdout.readline().strip()
        (process,) = servers_of(served).values()
        assert list(servers_of(served)) == [address]
        processes = family(process)
        assert len(processes) >= 2
        (driver,) = psutil.Process(run.pid).children()
        if killed == "the run and the driver":
            for each in processes:
                each.send_signal(signal.SIGSTOP)
            driver.kill()
        start = time.monotonic()
        run.kill()
        run.wait()
        alive = psutil.wait_procs([*processes, driver], timeout=LEFT_SECONDS)[1]
        print(f"{killed} killed: all processes had ended after {time.monotonic() - start:.1f} s")
    assert not alive
    assert not servers_of(served)


def test_what_a_node_cannot_start_is_named(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    check_cluster(cluster.address, 8)  # it has no GPUs
    for python, served, message in (
        ("/nowhere/python", folder, r"rollout\.start_python=/nowhere/python is no program on "),
        (str(ENGINES), tmp_path, rf"does not see {tmp_path}: set rollout\.publish_dir"),
        (str(ENGINES), folder, r"vLLM ended before it answered: .*unrecognized arguments: --nothing; see .*/0\.log"),
    ):
        options = ["--nothing"] if served == folder else []
        server = RayServer(cluster.address, 1, python, served, MAX_LENGTH, options, tmp_path / "logs/0.log", 60.0)
        try:
            with pytest.raises(EngineError, match=message):
                server.wait(300.0, lambda: None)
        finally:
            server.close()


def test_ray_gives_servers_their_gpus(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray believes what a node says of its GPUs; a program that says what it was given stands for vLLM."""
    ray_folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "Error: $CUDA_VISIBLE_DEVICES; $(env | grep -c ^RAY_); $*"\nsleep 20\n')
    program.chmod(0o755)
    cluster = Cluster()
    servers = []
    try:
        cluster.add_node(num_cpus=2, num_gpus=4, include_dashboard=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        check_cluster(cluster.address, 4)
        with pytest.raises(EngineError, match=r"needs 8 GPUs of one node, and no node of the cluster has more than 4"):
            check_cluster(cluster.address, 8)
        for number in range(2):
            log = tmp_path / f"logs/{number}.log"
            servers.append(RayServer(cluster.address, 2, str(program), folder, MAX_LENGTH, [], log, 60.0))
        for server in servers:
            with pytest.raises(EngineError, match="vLLM ended before it answered"):
                server.wait(300.0, lambda: None)
        printed = [(tmp_path / f"logs/{number}.log").read_text().split("; ") for number in range(2)]
        given = [gpus.removeprefix("Error: ").split(",") for gpus, _, _ in printed]
        assert [len(gpus) for gpus in given] == [2, 2]
        assert sorted(given[0] + given[1]) == ["2", "3", "6", "7"]
        assert all(of_ray == "0" and "chunked" not in command for _, of_ray, command in printed)
    finally:
        for server in servers:
            server.close()
        cluster.shutdown()
        shutil.rmtree(ray_folder, ignore_errors=True)
