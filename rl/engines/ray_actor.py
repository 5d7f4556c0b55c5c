"""What Ray runs on the node of a server. Like vllm_launch, it must import nothing of this project beside that."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import ray.util

from rl.engines.vllm_launch import LaunchError, VllmChild


class ServerActor:
    """One vLLM server on a node of a Ray cluster. It ends with the actor, and Ray ends the actor with the run."""

    def start(
        self, python: str, folder: str, max_length: int, options: Sequence[str], log: str, on_gpu: bool
    ) -> dict[str, str]:
        """Start the server, and return its `address`, or the `error`."""
        if not Path(folder, "config.json").is_file():
            return {
                "error": f"{socket.gethostname()} does not see {folder}: set rollout.publish_dir to a folder that all "
                "nodes of the Ray cluster see"
            }
        host = ray.util.get_node_ip_address()
        try:
            self._child = VllmChild(python, folder, host, max_length, options, log, on_gpu=on_gpu)
        except (LaunchError, OSError) as error:
            return {"error": str(error)}
        return {"address": self._child.address}

    def error(self) -> str:
        """Return why the server has ended; empty: it runs."""
        return "" if self._child.is_running else self._child.last_error()

    def stop(self) -> None:
        """End the server."""
        self._child.close()
