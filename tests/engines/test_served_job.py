"""Jobs of reinforcement learning on a real SLURM: vLLM serves on one node, and the other one trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from demo import digits
from tests.engines.engine_folders import ENGINES, ROOT, convert
from tests.launch import metrics, train
from tests.slurm.cluster import Cluster, free_ports, require_slurm, wait_for
from tests.slurm.jobs import log_of, state, submit_training, wait_for_log, wait_for_step

pytestmark = pytest.mark.timeout(1800)

OPTIONS = "--dtype float32 --enforce-eager --max-num-seqs 16 --max-model-len 1024"
ON_CPU = "--no-enable-chunked-prefill --max-num-batched-tokens 2048"  # vLLM 0.32: docs/rl.md
SERVERS = {"SERVER_NODES": "1", "SERVER_PYTHON": str(ENGINES), "SERVER_SECONDS": "900"}
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, a run that answers some of them, and its export."""
    folder = tmp_path_factory.mktemp("started")
    digits.build(folder / "digits", chats=48, prompts=32, held_out=8)
    keys = [f"data.tokenizer={folder}/digits/tokenizer", f"data.sources=[{{path: {folder}/digits/shards/chats}}]"]
    keys += ["train.steps=60", "train.global_batch_size=1", f"train.output_dir={folder}/start"]
    train(ROOT / "configs/tiny/rl_start.yaml", keys, processes=1)
    convert("export", "--checkpoint", folder / "start", "--out", folder / "hf")
    return folder


def submit(cluster: Cluster, started: Path, run: Path, more: Sequence[str] = (), **variables: str) -> int:
    keys = [f"data.tokenizer={started}/digits/tokenizer", f"model.init_from={started}/start"]
    keys += [f"{name}.sources=[{{path: {started}/digits/shards/{file}}}]" for name, file in SOURCES.items()]
    keys += [
        "rl.prompts=12",
        "rl.group=8",
        "rl.updates=2",
        "rollout.engine=vllm",
        "train.steps=3",
        "checkpoint.save_interval=2",
        *more,
    ]
    settings: dict[str, Any] = {
        **SERVERS,
        **VLLM,
        "SERVER_MODEL": f"{started}/hf",
        "SERVER_OPTIONS": f"{OPTIONS} {ON_CPU}",
    }
    settings |= {"SERVER_PORT": str(free_ports(1)[0]), **variables}
    return submit_training(cluster, "rl.sbatch", ROOT / "configs/tiny/rl.yaml", run, *keys, **settings)


SOURCES = {"data": "prompts", "validation": "held_out"}


def test_last_node_serves_and_the_first_one_trains(cluster: Cluster, started: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = cluster.wait(submit(cluster, started, run), timeout=1500)
    log = log_of(run)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), log
    assert "starting 1 servers" in log
    assert "1 servers answer after" in log
    assert state(run)["state"] == "complete"
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert sum(line["updates"] for line in lines) >= 2
    assert max(line["rollout/mismatch"] for line in lines if line["updates"]) < 2e-5  # it has the newest weights
    assert (run / "servers" / "node2-0.log").stat().st_size
    wait_for(lambda: not servers_of(ended["JobId"]), "the end of the servers", timeout=60)


@pytest.mark.slow
def test_a_job_that_is_preempted_and_requeued_comes_back_with_its_servers(
    cluster: Cluster, started: Path, tmp_path: Path
) -> None:
    """By SIGUSR1, as before the end of its time, and by `scontrol requeue`, which ends all processes by SIGTERM."""
    run = tmp_path / "run"
    number = submit(cluster, started, run, ("train.steps=16", "checkpoint.save_interval=1"))
    wait_for_step(run, 2, timeout=900)
    cluster.preempt(number)
    wait_for_log(run, "servers answer after", times=2, timeout=900)
    assert "; queued again" in log_of(run)
    stopped = len(metrics(run))
    assert 2 <= stopped < 14
    wait_for_step(run, stopped + 1, timeout=300)
    cluster.command("scontrol", "requeue", str(number))
    wait_for_log(run, "servers answer after", times=3, timeout=900)
    again = len(metrics(run))
    assert stopped < again < 16
    ended = cluster.wait(number, timeout=900)
    log = log_of(run)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), log
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert max(line["rollout/mismatch"] for line in lines if line["updates"]) < 2e-5
    wait_for(lambda: not servers_of(ended["JobId"]), "the end of the servers", timeout=60)


def servers_of(job: str) -> list[psutil.Process]:
    """Return the processes of vLLM that a job has left."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") == job and "vllm" in " ".join(process.cmdline()).lower():
                found.append(process)
    return found


def test_server_that_does_not_start_ends_the_job_with_its_log_named(
    cluster: Cluster, started: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, started, run, SERVER_OPTIONS="--no-such-option")
    ended = cluster.wait(job, timeout=600)
    log = log_of(run)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert f"error: the server on node2 ended with exit code 2 before it answered: see {run}/servers/node2-0.log" in log
    assert "unrecognized arguments: --no-such-option" in (run / "servers" / "node2-0.log").read_text()
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SERVER_NODES": "2"}, "SERVER_NODES=2: the job has 2 nodes, and at least one must train"),
        ({"SERVER_MODEL": ""}, "SERVER_MODEL is empty"),
        ({"SERVER_MODEL": "nowhere"}, "SERVER_MODEL=nowhere is no Hugging Face folder: it has no config.json"),
        ({"SERVER_PYTHON": "nothing"}, "SERVER_PYTHON=nothing is not there: give the Python of an environment"),
        ({"SERVERS_PER_NODE": "0"}, "SERVERS_PER_NODE=0 must divide the 0 GPUs of a node"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.partition(" ")[0],
)
def test_settings_that_cannot_work_end_the_job_at_once(
    cluster: Cluster, started: Path, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    run = tmp_path / "run"
    ended = cluster.wait(submit(cluster, started, run, **variables), timeout=120)
    assert ended["ExitCode"] == "2:0", log_of(run)
    assert f"error: {said}" in log_of(run)
