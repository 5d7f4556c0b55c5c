"""A run of rl.train whose servers Ray places on two nodes: killed while it draws, resumed, and a server killed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.engines.ray_cases import LEFT_SECONDS, family, kill_all, servers_of, two_nodes
from tests.engines.rollout_cases import TOLERANCE
from tests.engines.run_cases import (
    SECONDS,
    STARTED,
    Task,
    make_task,
    nothing_is_left,
    reach,
    start_run,
)
from tests.launch import finish, has_reached, metrics, process_of_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # four servers start, and machines may be busy

STEPS = 10


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


def test_a_run_on_a_ray_cluster_is_killed_and_comes_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    run, shared = tmp_path / "run", tmp_path / "shared"
    task: Task = make_task("glm4v", tmp_path / "task")
    servers = {**STARTED, "start": 2, "ray": cluster.address, "publish_dir": str(shared), "health_seconds": 20.0}
    config = task.config(
        run,
        rollout=servers,
        train={"steps": STEPS},
        rl={"prompts": 12, "group": 8, "updates": 2},
        expansion={"enabled": False},
    )

    launcher = start_run(config)
    reach(has_reached, launcher, run, 1)
    first = servers_of(shared)
    assert len(first) == 2
    reach(has_reached, launcher, run, 2)
    processes = [each for server in first.values() for each in family(server)]
    process_of_rank(launcher, 0).kill()
    finish(launcher, SECONDS)
    assert not psutil.wait_procs(processes, timeout=LEFT_SECONDS)[1]
    assert nothing_is_left(config)
    reached = len(metrics(run))
    assert reached < STEPS - 4

    launcher = start_run(config)
    reach(has_reached, launcher, run, reached + 1)
    again = servers_of(shared)
    assert len(again) == 2
    assert not first.keys() & again.keys()
    lost, process = next(iter(again.items()))
    kill_all(family(process))
    output = finish(launcher, SECONDS)
    assert launcher.returncode == 0, output
    print(re.findall(r"^.*(?:rollouts: |resume).*$", output, re.MULTILINE))
    assert len(re.findall(rf"rollouts: {lost} is lost", output)) == 1
    assert "Traceback" not in output
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert max(line["rollout/max_mismatch"] for line in lines if line["updates"]) <= TOLERANCE
    assert nothing_is_left(config)
    assert not servers_of(shared)
