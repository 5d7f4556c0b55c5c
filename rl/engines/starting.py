"""Where servers start that a run starts itself: on the machine of its first process, or on a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path

from model.backend import device_count
from rl.engines.ray_servers import RayServer, check_cluster
from rl.engines.server_gpus import check_machine, gpus_of_server, gpus_per_server
from rl.engines.servers_config import ServersConfig
from rl.engines.vllm_process import StartedServer, VllmProcess
from training.ranks import rank

AGAIN_SECONDS = 60.0  # for a node with room, when a server was lost: the others draw meanwhile


def check_placement(config: ServersConfig) -> None:
    """Check, on the first machine of the run, that it can start its servers.

    Raises:
        ConfigError, EngineError: it cannot.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not config.start or rank() >= processes:
        return
    each = gpus_per_server(config.start_options)
    if not config.ray:
        check_machine(
            config.start_gpus,
            config.start * each,
            shared=config.start_gpus_shared,
            count=device_count(),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            processes=processes,
        )
    elif rank() == 0:
        check_cluster(config.ray, each)


def start_server(
    config: ServersConfig, number: int, folder: Path, max_length: int, logs: Path, *, again: bool
) -> StartedServer:
    """Start one of the servers of rollout.start.

    Args:
        config: How.
        number: Which one, from 0.
        folder: The policy, with its tokenizer and processors.
        max_length: Tokens of a prompt and its response.
        logs: The folder for what servers print.
        again: Whether it was lost.

    Raises:
        EngineError: There is no such program.
    """
    python, options, log = config.start_python, config.start_options, logs / f"{number}.log"
    if config.ray:
        seconds = min(config.start_seconds, AGAIN_SECONDS) if again else config.start_seconds
        gpus = gpus_per_server(options)
        return RayServer(config.ray, gpus, python, folder, max_length, options, log, seconds)
    own_gpus = gpus_of_server(config.start_gpus, config.start, number)
    return VllmProcess(python, folder, max_length, options, log, own_gpus)
