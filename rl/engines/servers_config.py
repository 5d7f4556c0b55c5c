"""Which servers draw rollouts, and how long they may take."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.urls import is_web
from model.config import ConfigError
from rl.engines.server_gpus import SERVED, check_division, check_options, shown
from training.bounds import NOT_NEGATIVE, POSITIVE, check_bounds


@dataclass
class ServersConfig:
    """The keys of `rollout` for engines behind HTTP."""

    # addresses of running servers, such as http://10.0.0.7:8000
    addresses: list[str] = field(default_factory=list)
    start: int = 0  # servers that the run starts: on the machine of its first process, or where Ray places them
    start_python: str = ""  # the Python that has vLLM, such as .venv-engines/bin/python
    # further options of the servers that are started, such as ["--tensor-parallel-size", "8"]
    start_options: list[str] = field(default_factory=list)
    start_seconds: float = 900.0  # until a server that was started answers
    # numbers of the GPUs of all servers on that machine, divided over them in order; needed where there are GPUs
    start_gpus: list[int] = field(default_factory=list)
    start_gpus_shared: bool = False  # start_gpus may name GPUs that training uses too
    # the Ray cluster that places the servers, by the HOST:PORT of its head, or auto: the cluster of this machine
    ray: str = ""
    publish_dir: str = ""  # a folder that the servers see too, for the policy's weights; empty: weights in the run's
    concurrency: int = 64  # requests at the same time per server
    request_deadline: float = 600.0  # seconds for one request: then another server is asked
    deadline: float = 1800.0  # seconds for all rollouts of an iteration, and for publishing weights
    health_seconds: float = 30.0  # a server that does not answer /health within these is lost

    def check(self, engine: str) -> None:
        """Raise ConfigError for options that cannot work with an engine of servers."""
        bounds = dict.fromkeys(
            ("concurrency", "request_deadline", "deadline", "health_seconds", "start_seconds"), POSITIVE
        )
        check_bounds("rollout", self, {**bounds, "start": NOT_NEGATIVE})
        for address in self.addresses:
            if not is_web(address):
                raise ConfigError(f"rollout.addresses: {address!r} is no address: write http://HOST:PORT")
            if address.rstrip("/").endswith("/v1"):
                raise ConfigError(f"rollout.addresses: {address}: give the server's address without /v1")
        if len({address.rstrip("/") for address in self.addresses}) < len(self.addresses):
            raise ConfigError("rollout.addresses names a server twice")
        if not self.addresses and not self.start:
            raise ConfigError(
                f"rollout.engine={engine} needs servers: give rollout.addresses, or let the run start some "
                "(rollout.start)"
            )
        if self.start and engine != "vllm":
            raise ConfigError(f"rollout.start starts vLLM: start {engine} yourself, and give rollout.addresses")
        if self.start and not self.start_python:
            raise ConfigError("rollout.start needs rollout.start_python: the Python of an environment with vLLM")
        for name in ("start_python", "start_options", "start_seconds", "start_gpus", "start_gpus_shared", "ray"):
            if not self.start and (value := getattr(self, name)) != getattr(ServersConfig(), name):
                raise ConfigError(
                    f"rollout.{name}={value} has no effect, because rollout.start is 0: set it to a number of servers, "
                    "or remove this"
                )
        if self.start:
            self._check_placement()

    def _check_placement(self) -> None:
        """Check where servers start. Raises ConfigError."""
        check_options(self.start_options, (*SERVED, "--max-model-len"), "rollout.start_options")
        check_division(self.start_gpus, self.start, self.start_options, shared=self.start_gpus_shared)
        if self.ray and self.start_gpus:
            raise ConfigError(
                f"rollout.start_gpus={shown(self.start_gpus)} has no effect, because Ray gives servers their GPUs "
                "(rollout.ray): remove one of them"
            )
        host, _, port = self.ray.rpartition(":")
        if self.ray not in ("", "auto") and ("/" in host or not host or not port.isdecimal()):
            raise ConfigError(
                f"rollout.ray={self.ray}: give the HOST:PORT of the head of a Ray cluster to which this machine "
                "belongs, or auto"
            )
