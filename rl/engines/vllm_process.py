"""vLLM servers that the run starts itself, on the machine of its first process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from model.backend import has_gpu
from rl.engines.vllm import VllmServer
from rl.errors import EngineError

# Ends the server when this process ends, however it ends: then the pipe to `cat` is closed.
_KEEPER = 'exec 3<&0; "$@" </dev/null 3<&- & server=$!; (cat <&3 >/dev/null; kill $server) & wait $server'
_ROOT = Path(__file__).parents[2]  # from where vLLM imports rl.engines.vllm_worker
_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_SETTINGS = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; threads are not bound to cores
_LEAVE_SECONDS = 15.0


def vllm_command(python: str, folder: Path, port: int, max_length: int, options: Sequence[str]) -> list[str]:
    """Return the command that serves a Hugging Face folder to this project's client.

    Args:
        python: The Python that has vLLM.
        folder: The policy, with its tokenizer and processors.
        port: On 127.0.0.1.
        max_length: Tokens of a prompt and its response.
        options: Further options of vLLM.
    """
    # vLLM 0.32 on a CPU ends with an error when it reads a prompt with a seed in several chunks.
    on_cpu = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(max_length, 2048)))
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_length)),
        *("--enable-scale-out", "--worker-extension-cls", "rl.engines.vllm_worker.PolicyWorker"),
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
        *(() if has_gpu() else on_cpu),
        *options,
    ]


class VllmProcess:
    """A vLLM server that runs as long as this process, or until `close`.

    Args:
        python: The Python that has vLLM.
        folder: The policy, with its tokenizer and processors.
        max_length: Tokens of a prompt and its response.
        options: Further options of vLLM.
        log: The file for what it prints.

    Attributes:
        server: The client.
    """

    def __init__(self, python: str, folder: Path, max_length: int, options: Sequence[str], log: Path) -> None:
        """Start it. Raises EngineError if there is no such Python."""
        port = _free_port()
        self.server, self._log = VllmServer(f"http://127.0.0.1:{port}"), log
        defaults = _SETTINGS if has_gpu() else _SETTINGS | _ON_CPU
        environment = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        environment = defaults | environment | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(_ROOT)}
        environment["PATH"] = f"{Path(python).parent.absolute()}{os.pathsep}{environment.get('PATH', '')}"
        if not os.access(python, os.X_OK):
            raise EngineError(
                f"rollout.start_python={python} is no program: give the Python of an environment with vLLM"
            )
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                ["sh", "-c", _KEEPER, "sh", *vllm_command(python, folder, port, max_length, options)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._keeper.poll() is None

    def wait(self, seconds: float, on_wait: Callable[[], None]) -> None:
        """Wait until the server answers.

        Args:
            seconds: How long.
            on_wait: Called about once a second.

        Raises:
            EngineError: It has ended, or does not answer.
        """
        end = time.monotonic() + seconds
        while not self.server.is_healthy(1.0):
            if not self.is_running:
                raise EngineError(f"vLLM ended before it answered: {_last_error(self._log)}; see {self._log}")
            if time.monotonic() > end:
                raise EngineError(f"vLLM does not answer after rollout.start_seconds={seconds:g}; see {self._log}")
            time.sleep(0.5)
            on_wait()

    def close(self) -> None:
        """End the server."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_LEAVE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._keeper.pid, signal.SIGKILL)  # what is left of it
        self._keeper.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["it printed nothing"])[-1].strip()[:300]
