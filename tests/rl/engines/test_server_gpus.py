"""The GPUs of servers that a run starts. All of it is arithmetic with what CUDA and torchrun say: it needs no GPU."""

from __future__ import annotations

import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.config import ConfigError
from rl.config import RlConfig
from rl.engines.ray_servers import check_cluster
from rl.engines.server_gpus import check_machine, gpus_of_server, gpus_per_server
from rl.engines.servers_config import ServersConfig
from rl.engines.starting import check_placement
from rl.engines.vllm_process import VllmProcess
from rl.errors import EngineError
from training.config import load_config

ROOT = Path(__file__).parents[3]
NONE_STARTED: dict[str, Any] = {"start": 0, "start_python": "", "addresses": ["http://a:1"]}
EIGHT: dict[str, Any] = {"shared": False, "count": 8, "visible": None, "processes": 4}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ([], 1),
        (["--tensor-parallel-size", "8"], 8),
        (["--tensor_parallel_size=4", "-pp", "2"], 8),
        (["-tp", "2", "--seed", "7", "--tensor-parallel-size", "4"], 4),
        (["--data-parallel-size=2", "-tp=2", "--prefill-context-parallel-size", "2"], 8),
    ],
)
def test_gpus_of_a_server_follow_from_its_options(options: list[str], gpus: int) -> None:
    assert gpus_per_server(options) == gpus


@pytest.mark.fast
def test_gpus_are_divided_in_order() -> None:
    assert [gpus_of_server([4, 5, 6, 7], 2, number) for number in range(2)] == [[4, 5], [6, 7]]
    assert gpus_of_server([], 2, 1) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_options": ["--port", "8000"]}, r"rollout\.start_options has --port, which is set already"),
        (
            {"start_options": ["--max_model_len=64"]},
            r"rollout\.start_options has --max_model_len, which is set already",
        ),
        ({"start_options": ["-tp", "two"]}, r"rollout\.start_options: --tensor-parallel-size two is no size"),
        ({"start_gpus": [4, 5, 6]}, r"start_gpus=\[4,5,6\] has 3 GPUs, and rollout\.start=2 servers with 1 each .* 2$"),
        ({"start_gpus": [4, 5], "start_options": ["--tensor-parallel-size=4"]}, r"with 4 each .* need 8$"),
        ({"start_gpus": [4, 4]}, r"start_gpus=\[4,4\]: give each GPU once"),
        ({"start_gpus": [-1, 4]}, r"by its number from 0"),
        ({"start_gpus_shared": True}, r"has no effect without rollout\.start_gpus"),
        ({"start_gpus": [0, 1], "start_gpus_shared": True}, r"needs --gpu-memory-utilization in rollout\.start_opt"),
        ({**NONE_STARTED, "start_gpus": [1]}, r"start_gpus=\[1\] has no effect"),
        ({**NONE_STARTED, "ray": "auto"}, r"rollout\.ray=auto has no effect"),
        ({"ray": "auto", "start_gpus": [4, 5]}, r"Ray gives servers their GPUs \(rollout\.ray\): remove one"),
        ({"ray": "ray://head:10001"}, r"rollout\.ray=ray://head:10001: give the HOST:PORT of the head"),
        ({"ray": "head"}, r"rollout\.ray=head: give the HOST:PORT"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServersConfig(**{"start": 2, "start_python": "python", **options}).check("vllm")


@pytest.mark.fast
@pytest.mark.parametrize("ray", ["auto", "10.0.0.1:6379", "[fd00::1]:6379"])
def test_addresses_of_clusters_are_taken(ray: str) -> None:
    ServersConfig(start=2, start_python="python", ray=ray, start_options=["-tp", "8"]).check("vllm")


@pytest.mark.fast
def test_the_keys_are_read_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "rl.yaml"
    file.write_text("base: " + str(ROOT / "configs/tiny/rl.yaml") + "\n")
    keys = ["rollout.engine=vllm", "rollout.start=2", "rollout.start_python=python", "rollout.start_gpus=[4, 5]"]
    assert load_config(RlConfig, file, keys).rollout.start_gpus == [4, 5]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("gpus", "machine", "message"),
    [
        ([4, 5, 6, 7], {}, None),
        ([0, 1, 2, 3], {"visible": "4,5,6,7", "count": 4}, None),
        ([6, 7], {"visible": "0,1,2,3,4,5,6,7"}, None),
        ([], {"count": None}, None),
        ([3, 4], {"shared": True}, None),
        ([], {}, r"needs rollout\.start_gpus, the numbers of 2 GPUs of this machine: .* use \[0,1,2,3\]$"),
        ([3, 4], {}, r"start_gpus=\[3,4\]: training uses \[3\] too; start fewer .* rollout\.start_gpus_shared=true"),
        ([4, 5], {"visible": "4,5,6,7", "count": 4}, r"training uses \[4,5\] too"),
        ([1, 2], {"visible": "7, 2", "count": 2}, r"training uses \[2\] too"),
        ([7, 8], {}, r"names \[8\], and this machine has 8 GPUs, from 0"),
        ([4, 5], {"count": None}, r"start_gpus=\[4,5\], but this run sees no GPU: remove it"),
        ([4, 5], {"shared": True}, r"start_gpus_shared=true has no effect: training uses \[0,1,2,3\]"),
        ([4, 5], {"visible": "GPU-8932f937,GPU-1a"}, r"CUDA_VISIBLE_DEVICES=GPU-8932f937,GPU-1a cannot be compared"),
    ],
)
def test_gpus_of_servers_are_compared_with_those_of_training(
    gpus: Sequence[int], machine: dict[str, Any], message: str | None
) -> None:
    given = {**EIGHT, **machine}
    if message is None:
        check_machine(gpus, 2, **given)
        return
    with pytest.raises(ConfigError, match=message):
        check_machine(gpus, 2, **given)


@pytest.mark.parametrize(("rank", "is_refused"), [("0", True), ("3", True), ("4", False)])
def test_the_first_machine_decides(rank: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is no GPU, so that any number is refused, on the machine where servers would start."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = ServersConfig(start=1, start_python="python", start_gpus=[4])
    if is_refused:
        with pytest.raises(ConfigError, match="this run sees no GPU"):
            check_placement(config)
    else:
        check_placement(config)


def stand_in(folder: Path, *, trap: str = "") -> Path:
    """Write what stands for the Python with vLLM: it prints its environment, and does not end by itself."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{trap}\nenv\necho started: $*\nwhile :; do sleep 1; done\n")
    file.chmod(0o755)
    return file


def test_a_server_sees_its_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = stand_in(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    lines = {}
    for gpus in ([4, 5], []):
        log = tmp_path / f"{len(gpus)}.log"
        server = VllmProcess(str(program), tmp_path, 2048, ["--seed", "7"], log, gpus)
        try:
            while "started: " not in (log.read_text() if log.exists() else ""):
                time.sleep(0.05)
        finally:
            server.close()
        lines[len(gpus)] = log.read_text().splitlines()
        assert not server.is_running
    assert "CUDA_VISIBLE_DEVICES=4,5" in lines[2]
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in lines[0]
    assert not [line for line in lines[2] if re.match("LOCAL_WORLD_SIZE|MASTER_PORT|RAY_", line)]


LISTEN = """#!{python}
import socket, sys, time
time.sleep(0.3)  # as vLLM imports its modules
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM
sock.bind((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])))
sock.listen()
sock.accept()[0].sendall(b"vLLM")
time.sleep(60)
"""
IP_LOCAL_PORT_RANGE = 51  # Linux 6.3; Python 3.11 has no name for it


def test_a_port_that_vllm_will_need_is_given_to_nobody_else(tmp_path: Path) -> None:
    """Others ask Linux for any free port of a range of one port, as when all others are taken."""
    program = tmp_path / "python"
    program.write_text(LISTEN.format(python=sys.executable))
    program.chmod(0o755)
    server = VllmProcess(str(program), tmp_path, 2048, [], tmp_path / "0.log")
    try:
        port = int(server.server.address.rpartition(":")[2])
        for reuse in (0, 1):
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                try:
                    other.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
                except OSError:  # an older Linux
                    continue
                with pytest.raises(OSError, match="in use"):
                    other.bind(("127.0.0.1", 0))
        deadline = time.monotonic() + 30
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as client:
                assert client.recv(4) == b"vLLM"
                break
            assert time.monotonic() < deadline, (tmp_path / "0.log").read_text()
            time.sleep(0.05)
    finally:
        server.close()


START = """
import sys, time
from pathlib import Path
from rl.engines.vllm_process import VllmProcess
VllmProcess(sys.argv[1], Path(sys.argv[2]), 2048, [], Path(sys.argv[2]) / "0.log")
print(flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_server_that_hears_no_signal_ends_with_the_run(tmp_path: Path) -> None:
    program = stand_in(tmp_path, trap="trap '' TERM")
    command = [sys.executable, "-c", START, str(program), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        (keeper,) = psutil.Process(run.pid).children()
        while not (tmp_path / "0.log").read_text().count("started: "):
            time.sleep(0.05)
        family = [keeper, *keeper.children(recursive=True)]
        run.send_signal(signal.SIGKILL)
    alive = psutil.wait_procs(family, timeout=60)[1]
    assert not alive
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(program) in (each.info["cmdline"] or [])]


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"rollout\.ray=127\.0\.0\.1:1: no Ray cluster answers there.*`ray start --h"):
        check_cluster("127.0.0.1:1", 8)
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"rollout\.ray=auto needs Ray: pip install 'glmv-train\[ray\]'"):
        check_cluster("auto", 8)
