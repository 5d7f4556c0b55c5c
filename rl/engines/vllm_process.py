"""vLLM servers that the run starts itself, on the machine of its first process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from model.backend import has_gpu
from rl.engines.vllm import VllmServer
from rl.engines.vllm_launch import LaunchError, VllmChild
from rl.errors import EngineError


class StartedServer(Protocol):
    """A server that the run has started, and that ends with it."""

    server: VllmServer  # the client, from `wait` on

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""

    def wait(self, seconds: float, on_wait: Callable[[], None]) -> None:
        """Wait until the server answers.

        Args:
            seconds: How long.
            on_wait: Called about once a second.

        Raises:
            EngineError: It has ended, or does not answer.
        """

    def close(self) -> None:
        """End the server."""


class VllmProcess:
    """A vLLM server on this machine that runs as long as this process, or until `close`.

    Args:
        python: The Python that has vLLM.
        folder: The policy, with its tokenizer and processors.
        max_length: Tokens of a prompt and its response.
        options: Further options of vLLM.
        log: The file for what it prints.
        gpus: Numbers of its GPUs on this machine.

    Attributes:
        server: The client.
    """

    def __init__(
        self,
        python: str,
        folder: Path,
        max_length: int,
        options: Sequence[str],
        log: Path,
        gpus: Sequence[int] = (),
    ) -> None:
        """Start it. Raises EngineError if there is no such Python."""
        self._log = log
        try:
            self._child = VllmChild(
                *(python, str(folder), "127.0.0.1", max_length, options, str(log)), on_gpu=has_gpu(), gpus=gpus
            )
        except LaunchError as error:
            raise EngineError(str(error)) from None
        self.server = VllmServer(self._child.address)

    @property
    def is_running(self) -> bool:
        return self._child.is_running

    def wait(self, seconds: float, on_wait: Callable[[], None]) -> None:
        wait_for_answer(self, seconds, on_wait, self._log, self._child.last_error)

    def close(self) -> None:
        self._child.close()


def wait_for_answer(
    started: StartedServer, seconds: float, on_wait: Callable[[], None], log: Path, last_error: Callable[[], str]
) -> None:
    """Wait until a server answers, as StartedServer.wait. Raises EngineError."""
    end = time.monotonic() + seconds
    while not started.server.is_healthy(1.0):
        if not started.is_running:
            raise EngineError(f"vLLM ended before it answered: {last_error()}; see {log}")
        if time.monotonic() > end:
            raise EngineError(f"vLLM does not answer after rollout.start_seconds={seconds:g}; see {log}")
        time.sleep(0.5)
        on_wait()
