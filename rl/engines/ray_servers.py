"""vLLM servers on the nodes of a Ray cluster, each behind a process that talks to Ray (ray_driver)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.config import ConfigError
from rl.engines.vllm import VllmServer
from rl.engines.vllm_launch import LEAVE_SECONDS, OF_TORCHRUN, ROOT
from rl.engines.vllm_process import wait_for_answer
from rl.errors import EngineError

_CHECK_SECONDS = 120.0  # for a cluster to answer


class RayServer:
    """A vLLM server that Ray places on a node, until `close` or the end of this process.

    Args:
        address: Of the cluster.
        gpus: How many GPUs it needs, where the cluster has any.
        python: The Python that has vLLM, on all nodes.
        folder: The policy, with its tokenizer and processors, on all nodes.
        max_length: Tokens of a prompt and its response.
        options: Further options of vLLM.
        log: The file for what it prints, in a folder that all nodes see. What Ray prints goes to a file beside it.
        place_seconds: How long it may wait for a node with room.
    """

    server: VllmServer

    def __init__(
        self,
        address: str,
        gpus: int,
        python: str,
        folder: Path,
        max_length: int,
        options: Sequence[str],
        log: Path,
        place_seconds: float,
    ) -> None:
        self._address, self._log, self._place_seconds = address, log, place_seconds
        start = [str(Path(python).absolute()), str(folder), max_length, list(options), str(log)]
        given = {"address": address, "gpus": gpus, "seconds": place_seconds, "start": start}
        self._ray_log = log.with_suffix(".ray.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._ray_log.open("ab") as output:
            self._driver = subprocess.Popen(
                _command(given),
                bufsize=0,  # what select sees is all that there is
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._driver.poll() is None

    def wait(self, seconds: float, on_wait: Callable[[], None]) -> None:
        end = time.monotonic() + seconds
        limit = time.monotonic() + self._place_seconds + _CHECK_SECONDS
        while (said := self._answer(0.5)) is None:
            if time.monotonic() > limit:
                raise EngineError(f"rollout.ray={self._address}: it does not answer; see {self._ray_log}")
            on_wait()
        if "error" in said:
            raise EngineError(f"rollout.ray={self._address}: {said['error']}; see {self._ray_log}")
        self.server = VllmServer(said["address"])
        wait_for_answer(self, end - time.monotonic(), on_wait, self._log, self._last_error)

    def close(self) -> None:
        """End the server and the process that talks to Ray."""
        assert self._driver.stdin is not None
        self._driver.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._driver.wait(2 * LEAVE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._driver.pid, signal.SIGKILL)  # then Ray ends the server
        self._driver.wait()

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """Return what the driver says next; None: nothing within `seconds`."""
        assert self._driver.stdout is not None
        if not select.select([self._driver.stdout], [], [], seconds)[0]:
            return None
        return _read(self._driver.stdout.readline())

    def _last_error(self) -> str:
        return (self._answer(0.0) or {}).get("error", "without a reason")


def check_cluster(address: str, gpus: int) -> None:
    """Check that a Ray cluster can run servers.

    Args:
        address: Of the cluster.
        gpus: How many GPUs a server needs, where the cluster has any.

    Raises:
        ConfigError: Ray is not installed.
        EngineError: No cluster answers, it has other versions of Ray or Python, or no node has the GPUs.
    """
    if find_spec("ray") is None:
        raise ConfigError(f"rollout.ray={address} needs Ray: pip install 'glmv-train[ray]'")
    given = {"address": address, "gpus": gpus}
    try:
        done = subprocess.run(
            _command(given), env=_environment(), input=b"", capture_output=True, timeout=_CHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"rollout.ray={address}: no answer within {_CHECK_SECONDS:g} s; does `ray status` answer on this machine?"
        ) from None
    said = _read(done.stdout)
    if "error" in said:
        raise EngineError(f"rollout.ray={address}: {said['error']}")


def _command(given: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", "rl.engines.ray_driver", json.dumps(given)]


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(path)}


def _read(line: bytes) -> dict[str, Any]:
    """Return one answer of the driver."""
    return json.loads(line) if line.strip() else {"error": "the process that talks to Ray has ended"}
