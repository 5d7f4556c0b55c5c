"""The shipped job scripts on a real SLURM: a run that is preempted and queued again ends like one that was not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.sharding.build import build_shards
from tests.launch import ROOT, metrics, train
from tests.slurm.cluster import Cluster, require_slurm, wait_for
from tests.slurm.jobs import (
    log_of,
    shard_files,
    state,
    submit_chain,
    submit_training,
    tensors,
    wait_for_log,
    wait_for_step,
    weight_files,
)
from tools.conversion import export_checkpoint

STEPS = 30
RUN = [f"train.steps={STEPS}", "checkpoint.save_interval=1000", "train.deterministic=true", "optimizer.warmup_steps=2"]


def test_preempted_job_is_queued_again_and_ends_with_the_same_bits(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    job = submit_training(cluster, "pretrain.sbatch", config_file, run, *RUN)
    wait_for_step(run, 2)
    cluster.preempt(job)
    wait_for_log(run, "queued again")
    stopped = state(run)
    assert (stopped["state"], 2 <= stopped["step"] < STEPS) == ("stopped", True)
    ended = cluster.wait(job, timeout=150)
    log = log_of(run)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert state(run) == {"state": "complete", "step": STEPS, "steps": STEPS, "reason": ""}
    assert not (run / "stop").exists()
    train(config_file, [*RUN, f"train.output_dir={undisturbed}"])
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(undisturbed)]
    assert tensors(run, STEPS) == tensors(undisturbed, STEPS)


def test_mistakes_end_a_job_at_once_and_cancel_the_jobs_that_wait_for_it(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    nothing = submit_training(cluster, "pretrain.sbatch", None, run)
    waiting = submit_training(
        cluster,
        "sft.sbatch",
        config_file,
        tmp_path / "later",
        options=(f"--dependency=afterok:{nothing}", "--kill-on-invalid-dep=yes"),
    )
    ended = cluster.wait(nothing, timeout=60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: CONFIG is empty" in log_of(run)
    assert cluster.wait(waiting, timeout=60)["JobState"] == "CANCELLED"
    assert not (tmp_path / "later").exists()
    elsewhere = submit_training(cluster, "pretrain.sbatch", config_file, run, f"train.output_dir={tmp_path}/elsewhere")
    assert cluster.wait(elsewhere, timeout=60)["ExitCode"] == "2:0"
    assert "error: give the run folder as OUTPUT_DIR instead of train.output_dir=" in log_of(run)


def test_sbatch_accepts_the_scripts_as_they_are(cluster: Cluster) -> None:
    for script in sorted((ROOT / "slurm").glob("*.sbatch")):
        cluster.command("sbatch", "--test-only", "--nodes=1", f"{script}")


# --- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chain_of_stages_with_a_preemption_in_each(
    cluster: Cluster, shards: Path, config_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Pretrain, long context, fine-tune and export, as a user chains them; all files equal the undisturbed ones."""
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    scripts = {"pretrain": "pretrain.train", "long_context": "pretrain.train", "sft": "sft.train"}
    stages = {folder: _write_chain(folder, config_file, shards) for folder in (disturbed, undisturbed)}
    jobs = dict(zip(scripts, submit_chain(cluster, stages[disturbed], *RUN), strict=True))
    export = cluster.submit(
        f"--output={disturbed}/export.log",
        "--cpus-per-task=1",
        f"--dependency=afterok:{jobs['sft']}",
        "slurm/convert.sbatch",
        *("export", "--checkpoint", str(disturbed / "sft"), "--out", str(disturbed / "hf")),
        cwd=ROOT,
        variables={"PYTHON": sys.executable},
    )
    for stage, job in jobs.items():
        wait_for_step(disturbed / stage, 3, timeout=240)
        cluster.preempt(job)
        ended = cluster.wait(job, timeout=240)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log_of(disturbed / stage)
    assert cluster.wait(export, timeout=120)["JobState"] == "COMPLETED", (disturbed / "export.log").read_text()

    for (stage, entry), file in zip(scripts.items(), stages[undisturbed], strict=True):
        train(file, RUN, entry=entry)
        assert tensors(disturbed / stage, STEPS) == tensors(undisturbed / stage, STEPS), stage
    export_checkpoint(undisturbed / "sft", undisturbed / "hf")
    assert weight_files(disturbed / "hf") == weight_files(undisturbed / "hf") != {}


def _write_chain(folder: Path, base: Path, shards: Path) -> list[Path]:
    """Write the YAML files of three stages, each of which starts from the one before, and return their paths."""
    folder.mkdir()
    longer = {"seq_length": 256, "global_batch_size": 2}
    chats = {"sources": [{"path": str(shards / "chats")}]}
    stages: dict[str, dict[str, Any]] = {
        "pretrain": {"train": {}},
        "long_context": {"train": longer, "model": {"init_from": str(folder / "pretrain")}},
        "sft": {"train": longer, "model": {"init_from": str(folder / "long_context")}, "data": chats},
    }
    for name, keys in stages.items():
        content = {**keys, "base": str(base), "train": {**keys["train"], "output_dir": str(folder / name)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [folder / f"{name}.yaml" for name in stages]


@pytest.mark.slow
def test_killed_node_does_not_end_the_run(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    keys = [*RUN, "checkpoint.save_interval=4"]
    job = submit_training(cluster, "pretrain.sbatch", config_file, run, *keys)
    wait_for_step(run, 6)
    cluster.kill_node("node2", job)
    cluster.start_node("node2")
    ended = cluster.wait(job, timeout=200)
    assert (ended["JobState"], int(ended["Restarts"]) >= 1) == ("COMPLETED", True), log_of(run)
    train(config_file, [*keys, f"train.output_dir={undisturbed}"])
    assert tensors(run, STEPS) == tensors(undisturbed, STEPS)


@pytest.mark.slow
def test_killed_process_is_started_again_within_the_job(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    keys = [*RUN, "checkpoint.save_interval=4"]
    job = submit_training(cluster, "pretrain.sbatch", config_file, run, *keys, MAX_RESTARTS="1")
    wait_for_step(run, 6)
    assert cluster.kill_processes(SLURM_JOB_ID=str(job), RANK="1", LOCAL_RANK="0") > 0
    ended = cluster.wait(job, timeout=200)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), log_of(run)
    train(config_file, [*keys, f"train.output_dir={undisturbed}"])
    assert tensors(run, STEPS) == tensors(undisturbed, STEPS)


@pytest.mark.slow
def test_crashing_run_is_queued_again_a_limited_number_of_times(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    """The processes are killed at every start, so that no checkpoint is ever written."""
    run = tmp_path / "run"
    job = submit_training(
        cluster, "pretrain.sbatch", config_file, run, *RUN, "health.hang_seconds=60", MAX_RESTARTS="0", MAX_CRASHES="1"
    )
    for start in (1, 2):
        wait_for_log(run, f"step 1/{STEPS}", times=start)
        assert cluster.kill_processes(SLURM_JOB_ID=str(job), RANK="1", LOCAL_RANK="0") > 0
        wait_for_log(run, "the run crashed", times=start)
    ended = cluster.wait(job, timeout=100)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1"), log_of(run)
    assert "crashed 1 times without a new checkpoint: given up" in log_of(run)


@pytest.mark.slow
def test_bad_node_is_named_and_excluded(config_file: Path, tmp_path: Path) -> None:
    require_slurm()
    small = {"node2": "mount -t tmpfs -o size=1m tmpfs /dev/shm"}
    run = tmp_path / "run"
    with Cluster(tmp_path / "slurm", nodes=3, mounts=small) as cluster:
        job = submit_training(cluster, "pretrain.sbatch", config_file, run, *RUN, CHECK_NODES="1")
        ended = cluster.wait(job, timeout=300)
    log = log_of(run)
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("COMPLETED", "1", "node2"), log
    assert ended["NodeList"] == "node[1,3]"
    assert "bad node node2: /dev/shm has 1 MiB free, and the job wants 64 MiB" in log
    assert "node node3: imports, 0 GPUs, shared memory and disk are in order" in log
    assert "network: 2 processes" in log


@pytest.mark.slow
def test_check_that_fails_on_all_nodes_excludes_none(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit_training(
        cluster, "pretrain.sbatch", config_file, run, *RUN, CHECK_NODES="1", GPUS_PER_NODE="1", CUDA_VISIBLE_DEVICES=""
    )
    ended = cluster.wait(job, timeout=200)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), log_of(run)
    assert log_of(run).count("0 GPUs are seen, and the job wants 1") == 2
    assert "all 2 nodes fail the check" in log_of(run)


@pytest.mark.slow
def test_failed_shard_is_one_failed_task(cluster: Cluster, tokenizer_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "texts", tmp_path / "shards"
    source.mkdir()
    for number in range(4):
        lines = [{"domain": "text", "text": f"line {n} of file {number}"} for n in range(20)]
        (source / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["build", "--input", str(source), "--out", str(out), "--tokenizer", str(tokenizer_folder), "--name", "s"]
    words += ["--shard-bytes", "4KB"]
    options = ("--array=0-3", "--cpus-per-task=1", "--open-mode=append", f"--output={tmp_path}/%a.log")

    def submit() -> list[str]:
        command = (*options, "slurm/shard_array.sbatch", *words, "--executor", "here")
        job = cluster.submit(*command, cwd=ROOT, variables={"PYTHON": sys.executable})
        if not out.exists():  # the first time, the process of one task is killed while it starts
            task = {"SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": "2", "SLURM_PROCID": "0"}
            wait_for(lambda: cluster.kill_processes(**task) > 0, "the process of task 2")
        return [cluster.wait(f"{job}_{number}", timeout=150)["JobState"] for number in range(4)]

    assert submit() == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert submit() == ["COMPLETED"] * 4
    undisturbed = tmp_path / "undisturbed"
    build_shards(sorted(source.iterdir()), undisturbed, tokenizer=tokenizer_folder, name="s", shard_bytes=4000)
    assert shard_files(out) == shard_files(undisturbed) != {}
