"""The process between a run and Ray: it lets Ray place one server, and ends it when its input ends.

    python -m rl.engines.ray_driver JSON

It is not the run's own process because Ray ends a process whose cluster does not answer for a minute, and takes its
SIGTERM. It answers in lines of JSON: the `address` of the server, and an `error` where it cannot start or has ended.
Like vllm_launch, it must import nothing of this project beside what runs on the nodes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig

from rl.engines.ray_actor import ServerActor
from rl.engines.vllm_launch import LEAVE_SECONDS, ROOT

POLL_SECONDS = 1.0
CONNECT_SECONDS = 20.0
Say = Callable[[Mapping[str, Any]], None]


class Failed(Exception):
    """What the run has to be told."""


def main() -> None:
    """Do what the argument says, and answer on what was the standard output: Ray prints too."""
    answers = os.dup(1)
    os.dup2(2, 1)

    def say(content: Mapping[str, Any]) -> None:
        os.write(answers, json.dumps(content).encode() + b"\n")

    is_left = threading.Event()
    threading.Thread(target=_wait_for_end, args=(is_left,), daemon=True).start()
    try:
        _serve(json.loads(sys.argv[1]), say, is_left)
    except Failed as error:
        say({"error": str(error)})
    except RayError as error:
        say({"error": f"Ray failed: {_cause(error)}"})


def _wait_for_end(is_left: threading.Event) -> None:
    while os.read(0, 1):
        pass
    is_left.set()


def _serve(given: Mapping[str, Any], say: Say, is_left: threading.Event) -> None:
    """Run one server until nobody waits for it any more, or only look at the cluster.

    Args:
        given: `address` of the cluster and `gpus` of a server; for a server also `seconds` to place it, and `start`,
            the arguments of ServerActor.start but the last.
        say: Answers the run.
        is_left: Set when nobody waits any more.

    Raises:
        Failed: There is no such cluster or node, or the server has ended.
        RayError: Ray lost the server or its node.
    """
    _connect(given["address"])
    gpus = _gpus(given["gpus"])
    if "start" not in given:
        say({"gpus": gpus})
        return
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
    actor: Any = ray.remote(ServerActor).options(**options).remote()
    started = _result(actor.start.remote(*given["start"], gpus > 0), given["seconds"], is_left)
    if is_left.is_set():
        return
    if started is None:
        raise Failed(_no_room(gpus, given["seconds"]))
    if "error" in started:
        raise Failed(started["error"])
    say(started)
    while not is_left.wait(POLL_SECONDS):
        if problem := _result(actor.error.remote(), math.inf, is_left):
            raise Failed(problem)
    ray.get(actor.stop.remote(), timeout=LEAVE_SECONDS + 5)


def _connect(address: str) -> None:
    """Join a cluster as a driver. Raises Failed."""
    host, _, port = address.rpartition(":")
    try:
        if host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(
            address,
            job_config=JobConfig(code_search_path=[str(ROOT)]),
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError) as error:
        raise Failed(
            f"no Ray cluster answers there, or this machine is no node of it ({_cause(error)}): run `ray start --head` "
            "on one machine, and `ray start --address=HOST:PORT` on the others and on this one"
        ) from error
    except RuntimeError as error:
        raise Failed(f"{_cause(error)}: all nodes need the run's versions of Ray and Python") from error


def _gpus(wanted: int) -> int:
    """Return the GPUs of a server: none where the cluster has none. Raises Failed."""
    most = max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
    if 0 < most < wanted:
        raise Failed(
            f"a server needs {wanted} GPUs of one node, and no node of the cluster has more than {most:g}: lower "
            "--tensor-parallel-size in rollout.start_options, or add nodes"
        )
    return wanted if most else 0


def _result(task: Any, seconds: float, is_left: threading.Event) -> Any:
    """Return what a task returns; None if it has not after some time, or nobody waits for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_left.is_set():
        if ray.wait([task], timeout=POLL_SECONDS)[0]:
            return ray.get(task)
    return None


def _no_room(gpus: int, seconds: float) -> str:
    free = ray.available_resources()
    return (
        f"no node had 1 CPU and {gpus} GPUs free within {seconds:g} s (free in the whole cluster: "
        f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs): lower rollout.start, or add nodes"
    )


def _cause(error: Exception) -> str:
    """Return one line of an error: Ray's have the cause at their end, below lines of other processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0]]
    return " ".join(named[-1:] or lines)[:400]


if __name__ == "__main__":
    main()
