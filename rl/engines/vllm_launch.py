"""Starts vLLM's server as a child process. It runs on the machine of the server, which may be another than the run's.

Ray imports this module on a node, in the Python that Ray was started with: it must import nothing of this project.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LEAVE_SECONDS = 15  # for a server that ends; then it is killed

# Ends the server when this process ends, however it ends: then the pipe to `cat` is closed.
_KEEPER = (
    'exec 3<&0; "$@" </dev/null 3<&- & server=$!; '
    f"(cat <&3 >/dev/null; kill $server; sleep {LEAVE_SECONDS}; kill -9 -$$) & wait $server"
)
ROOT = Path(__file__).parents[2]  # from where vLLM imports rl.engines.vllm_worker
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_SETTINGS = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; threads are not bound to cores


class LaunchError(Exception):
    """vLLM cannot be started. The message says what to change."""


class VllmChild:
    """vLLM's server as a child process, until `close` or the end of this process.

    Args:
        python: The Python that has vLLM.
        folder: The policy, with its tokenizer and processors.
        host: The address of this machine where it listens.
        max_length: Tokens of a prompt and its response.
        options: Further options of vLLM.
        log: The file for what it prints.
        on_gpu: Whether it runs on GPUs.
        gpus: Their numbers on this machine; empty: those that CUDA_VISIBLE_DEVICES names.

    Attributes:
        address: Where it will answer, such as http://127.0.0.1:40123.
    """

    def __init__(
        self,
        python: str,
        folder: str,
        host: str,
        max_length: int,
        options: Sequence[str],
        log: str,
        *,
        on_gpu: bool,
        gpus: Sequence[int] = (),
    ) -> None:
        """Start it. Raises LaunchError if there is no such Python."""
        if not os.access(python, os.X_OK):
            raise LaunchError(
                f"rollout.start_python={python} is no program on {socket.gethostname()}: give the Python of an "
                "environment with vLLM"
            )
        self._held = _hold_port(host)
        port = self._held.getsockname()[1]
        self.address, self._log = f"http://{f'[{host}]' if ':' in host else host}:{port}", Path(log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            self._keeper = subprocess.Popen(
                ["sh", "-c", _KEEPER, "sh", *_command(python, folder, host, port, max_length, options, on_gpu=on_gpu)],
                env=_environment(python, on_gpu=on_gpu, gpus=gpus),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._keeper.poll() is None

    def last_error(self) -> str:
        """Return the last line of its log that is an error, or its last line."""
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return (errors or lines or ["it printed nothing"])[-1].strip()[:300]

    def close(self) -> None:
        """End the server."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(LEAVE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._keeper.pid, signal.SIGKILL)  # what is left of it
        self._keeper.wait()
        self._held.close()


def _command(
    python: str, folder: str, host: str, port: int, max_length: int, options: Sequence[str], *, on_gpu: bool
) -> list[str]:
    """Return the command that serves a Hugging Face folder to this project's client."""
    # vLLM 0.32 on a CPU ends with an error when it reads a prompt with a seed in several chunks.
    on_cpu = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(max_length, 2048)))
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
        *("--host", host, "--port", str(port), "--max-model-len", str(max_length)),
        *("--enable-scale-out", "--worker-extension-cls", "rl.engines.vllm_worker.PolicyWorker"),
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
        *(() if on_gpu else on_cpu),
        *options,
    ]


def _environment(python: str, *, on_gpu: bool, gpus: Sequence[int]) -> dict[str, str]:
    """Return this process's environment without what torchrun and Ray say about it, and with what vLLM needs."""
    defaults = _SETTINGS if on_gpu else _SETTINGS | _ON_CPU
    own = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
    environment = defaults | {name: value for name, value in own.items() if not name.startswith("RAY_")}
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(python).parent.absolute()}{os.pathsep}{environment.get('PATH', '')}"
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return environment


def _hold_port(host: str) -> socket.socket:
    """Return a socket with a free port, which no other program gets while vLLM imports its modules, before it listens.

    Linux lets vLLM listen there: both sockets have SO_REUSEADDR, and this one never listens. It gives the port to no
    program that asks for any free one, or that connects to somewhere.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, 0))
    return held
