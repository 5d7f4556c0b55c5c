"""tools.launch on a real SLURM: a recipe at its size, chains, and a container where pyxis is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import log_of, submit_training
from tests.tools.test_launch import UNPLANNED, launch, refuse

CHAIN = [f"configs/glm45v/{name}.yaml" for name in ("pretrain", "long_context", "sft")]


@pytest.fixture(autouse=True)
def user(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process see the cluster, in the root of the clone."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.chdir(ROOT)


def test_recipe_could_start_on_32_nodes_of_8_gpus(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    words = ["--skip-files", "--partition", "large", "--time", "2-0", "--out", script]
    launch("--config", CHAIN[0], "--nodes", 32, "--no-plan", *words)

    def would_start(*options: str) -> str:
        command = ["sbatch", "--test-only", *options, str(script)]
        done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60)
        return done.stderr

    assert "using 4096 processors on nodes large[1-32] in partition large" in would_start()
    assert "Requested node configuration is not available" in would_start("--gpus-per-node=9")
    assert "Requested node configuration is not available" in would_start("--nodes=33")


def test_chain_is_submitted_and_each_stage_waits_for_the_one_before(cluster: Cluster) -> None:
    options = ["--partition", "closed", "--sbatch", "comment=night", "--job-name", "glm"]
    said = launch("--nodes", "32,32,16", *UNPLANNED, "--submit", *options, "--chain", *CHAIN, "train.seed=3")
    numbers = [line.split()[0] for line in said.splitlines()]
    jobs = [cluster.job(number) for number in numbers]
    assert [job["NumNodes"].split("-")[0] for job in jobs] == ["32", "32", "16"]
    assert {(job["TresPerNode"], job["Comment"], job["JobName"]) for job in jobs} == {("gres:gpu:8", "night", "glm")}
    after = [job["Dependency"].split("(")[0] for job in jobs]
    assert after[1:] == [f"afterok:{number}" for number in numbers[:-1]]
    cluster.command("scancel", numbers[0])
    assert [cluster.wait(number, timeout=60)["JobState"] for number in numbers] == ["CANCELLED"] * 3


def test_chain_of_which_sbatch_refuses_a_part_leaves_no_job(cluster: Cluster) -> None:
    said = refuse("--nodes", "32,64", *UNPLANNED, "--submit", "--partition", "closed", "--chain", CHAIN[0], CHAIN[1])
    assert f"sbatch refused {CHAIN[1]}" in said
    (number,) = said.split("the jobs before it are cancelled:")[1].split()
    assert cluster.wait(number, timeout=60)["JobState"] == "CANCELLED"


def test_container_without_pyxis_is_refused_before_and_in_the_job(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image.sqsh"
    image.touch()
    words = ["--config", CHAIN[0], "--nodes", 32, "--submit", "--container", image, *UNPLANNED]
    assert "does not list --container-image" in refuse(*words)
    job = submit_training(cluster, "pretrain.sbatch", config_file, tmp_path / "run", CONTAINER_IMAGE=str(image))
    ended = cluster.wait(job, timeout=60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: CONTAINER_IMAGE needs NVIDIA's plugin pyxis" in log_of(tmp_path / "run")
