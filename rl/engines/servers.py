"""Engines behind HTTP: the first process of the run asks the servers, and all processes get their answers.

A wait may take long. So that no collective waits longer than its timeout, the first process says every BEAT_SECONDS
that it still works, and the others wait for that.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from common.urls import shown
from data_pipeline.errors import Interrupted
from rl.engines.dispatch import Dispatch, Job, Place
from rl.engines.forcing import Response, ResponseTokens
from rl.engines.loading import load_watched
from rl.engines.prompt_media import served_prompt
from rl.engines.server import Expected, RequestFailed, Server, ServerGone
from rl.engines.servers_config import ServersConfig
from rl.engines.sglang import SglangServer
from rl.engines.starting import start_server
from rl.engines.vllm import VllmServer
from rl.engines.vllm_process import StartedServer
from rl.errors import EngineError
from rl.publishing import write_policy
from rl.rollouts import Request, Rollout, Sampling

if TYPE_CHECKING:
    from training.step import TrainStep

CLIENTS: dict[str, Callable[[str], Server]] = {"vllm": VllmServer, "sglang": SglangServer}
BEAT_SECONDS = 20.0
KEPT_VERSIONS = 2  # folders of weights: a server may still be reading the one before
log = logging.getLogger("glmv.rollouts")  # below the run's logger, so that warnings reach its log
Result = TypeVar("Result")


class ServersEngine:
    """Rollouts drawn by servers. Every process of the run has one; the first one talks to the servers.

    Args:
        kind: One of CLIENTS.
        config: Which servers, and their limits.
        expected: What they must serve.
        special: The tokens that end a response.
        folder: The run's. Weights and logs of servers go into it.
        hf_files: Fills a folder with the files beside the weights, as for a checkpoint.
        on_wait: Called on every process at least every BEAT_SECONDS while it waits for servers, on the first one about
            once a second. Where it raises Interrupted there, what has not been drawn is given up.

    Attributes:
        quarantined: The prompts of the last call of `generate` that failed twice, with the reason. Their groups are not
            among the rollouts.
    """

    def __init__(
        self,
        kind: str,
        config: ServersConfig,
        expected: Expected,
        special: ResponseTokens,
        folder: Path,
        hf_files: Callable[[Path], None],
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Check that the servers of `rollout.addresses` serve the policy. Collective.

        Raises:
            EngineError: One of them does not answer or serves something else.
        """
        config.check(kind)
        self.quarantined: dict[str, str] = {}
        self._config, self._expected, self._special = config, expected, special
        self._weights = _own_folder(Path(config.publish_dir), folder) if config.publish_dir else folder / "weights"
        self._weights = self._weights.absolute()
        # Servers on other machines see the folder of the weights.
        self._logs = (self._weights if config.ray and config.publish_dir else folder.absolute()) / "servers"
        self._hf_files, self._on_wait = hf_files, on_wait
        self._places = [Place(CLIENTS[kind](address)) for address in config.addresses]
        self._processes: dict[int, StartedServer] = {}  # by the number of their place
        self._published: list[int] = []
        self._name = f"{folder.absolute().name}-{secrets.token_hex(4)}"  # of this process's weights, on servers
        self._last_beat = 0.0
        self._on_first_process(self._check_all)

    def publish(self, trainer: TrainStep, version: int) -> None:
        """Write the weights to a folder and let every server load them. Collective.

        A lost server is asked again: if it answers now, it takes part again.

        Raises:
            EngineError: No server took them.
            Interrupted: The run was asked to stop while its servers started.
        """
        target = self._folder(version)
        write_policy(trainer, target, version, hf_files=self._hf_files)
        self._on_first_process(lambda: self._load_all(target, version))
        self._published.append(version)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Draw rollouts with the published weights. Collective.

        Raises:
            EngineError: No server is left, the deadline is over, or a server has read another prompt.
            Interrupted: The run was asked to stop. What the servers still draw is not used.
        """
        rollouts, self.quarantined = self._on_first_process(lambda: self._draw_all(requests, sampling))
        return rollouts

    def close(self) -> None:
        """End the servers that this run started."""
        if self._processes:
            with ThreadPoolExecutor(len(self._processes)) as threads:
                list(threads.map(lambda process: process.close(), self._processes.values()))
        self._processes.clear()

    # --- work of the first process ------------------------------------------------------------------------------------

    def _check_all(self) -> None:
        for place in self._places:
            try:
                place.server.check(self._expected)
            except ServerGone as error:
                raise EngineError(
                    f"rollout.addresses: {shown(place.server.address)} does not answer ({error}): start the server, "
                    "or correct the address"
                ) from None

    def _load_all(self, target: Path, version: int) -> None:
        """Let all servers load a folder at the same time, and remove folders that none needs."""
        self._start_missing(target)
        with ThreadPoolExecutor(len(self._places)) as threads:
            loading = [threads.submit(self._load, place, target, version) for place in self._places]
            while wait(loading, 1.0).not_done:
                with suppress(Interrupted):  # they are loaded in any case: drawing ends at once then
                    self._beat()
        reasons = [done.result() for done in loading]
        if all(reasons):
            raise EngineError(f"no server took the weights of version {version}: {'; '.join(reasons)}")
        kept = {target, *(self._folder(version) for version in self._published[-KEPT_VERSIONS + 1 :])}
        for old in set(self._weights.glob("version_*")) - kept:
            shutil.rmtree(old, ignore_errors=True)

    def _load(self, place: Place, target: Path, version: int) -> str:
        """Let a server load a folder, and return why it did not."""
        address = shown(place.server.address)
        try:
            if not place.server.is_healthy(self._config.health_seconds):
                raise ServerGone(f"no answer to /health within {self._config.health_seconds:g} s")
            if place.lost:
                place.server.check(self._expected)
            name, limits = self._version_name(version), self._config
            load_watched(place.server, target, name, limits.deadline, limits.health_seconds)
        except (ServerGone, RequestFailed, EngineError) as error:
            hint = f"; does it see {target} (rollout.publish_dir)?" if isinstance(error, RequestFailed) else ""
            if not place.lost:
                log.warning(f"rollouts: {address} is lost ({error}{hint})")
            place.lost = f"{error}{hint}"
            return f"{address}: {error}{hint}"
        if place.lost:
            log.warning(f"rollouts: {address} takes part again")
        place.lost = ""
        return ""

    def _start_missing(self, folder: Path) -> None:
        """Start the servers of rollout.start, and those again that have ended or hang."""
        first, length = len(self._config.addresses), self._expected.max_length
        started = []
        for number in range(first, first + self._config.start):
            process = self._processes.get(number)
            if process is not None:
                problem = self._problem(process)
                if not problem:
                    continue
                if not (place := self._places[number]).lost:
                    log.warning(f"rollouts: {shown(place.server.address)} is lost ({problem}); it is started again")
                process.close()
            process = start_server(self._config, number - first, folder, length, self._logs, again=process is not None)
            self._processes[number] = process
            started.append((number, process))
        for number, process in started:
            try:
                process.wait(self._config.start_seconds, self._beat)
                process.server.check(self._expected)
                self._places[number : number + 1] = [Place(process.server)]
            except (ServerGone, EngineError) as error:
                if not self._published:
                    raise EngineError(str(error)) from error
                process.close()  # and started again with the next weights
                log.warning(f"rollouts: a server could not be started again ({error})")
                self._places[number].lost = str(error)

    def _problem(self, process: StartedServer) -> str:
        """Return why a server that was started cannot be used; empty: it can."""
        if not process.is_running:
            return "it has ended"
        seconds = self._config.health_seconds
        return "" if process.server.is_healthy(seconds) else f"no answer to /health within {seconds:g} s"

    def _draw_all(self, requests: Sequence[Request], sampling: Sampling) -> tuple[list[Rollout], dict[str, str]]:
        version = self._published[-1]
        groups = []
        for request in requests:
            prompt, thinks = served_prompt(request.prompt, self._expected.tokenizer), request.prompt.thinks
            responses = [Response(self._special, sampling, thinks) for _ in request.seeds]
            pairs = zip(responses, request.seeds, strict=True)
            groups.append([Job(prompt, response, seed) for response, seed in pairs])
        name, stops = self._version_name(version), self._special.stops
        dispatch = Dispatch(self._places, groups, self._config, sampling.temperature, stops, name)
        dispatch.run(self._beat)
        rollouts = [
            job.response.rollout(request, number, version)
            for request, group in zip(requests, groups, strict=True)
            if request.prompt.id not in dispatch.quarantined
            for number, job in enumerate(group)
        ]
        return rollouts, dispatch.quarantined

    def _version_name(self, version: int) -> str:
        """Return what servers call a version of the weights: other runs on the same servers count theirs too."""
        return f"{version} of {self._name}"

    def _folder(self, version: int) -> Path:
        return self._weights / f"version_{version:07d}"

    # --- all processes ------------------------------------------------------------------------------------------------

    def _on_first_process(self, work: Callable[[], Result]) -> Result:
        """Return on all processes what `work` returns on the first, and raise on all what it raises."""
        if dist.get_rank() > 0:
            while (said := _broadcast(None)) == ("working", None):
                with suppress(Interrupted):  # the first process decides, which learns of the request as well
                    self._on_wait()
        else:
            self._last_beat = time.monotonic()
            try:
                said = ("done", work())
            except Exception as error:
                is_known = isinstance(error, (EngineError, Interrupted))
                _broadcast(("failed", error if is_known else EngineError(f"{error!r}")))
                raise
            _broadcast(said)
        outcome, content = said
        if outcome == "failed":
            raise content
        return content

    def _beat(self) -> None:
        """Tell the other processes now and then that the first one still works. Raises Interrupted as `on_wait`."""
        if time.monotonic() - self._last_beat > BEAT_SECONDS:
            self._last_beat = time.monotonic()
            _broadcast(("working", None))
        self._on_wait()


def _own_folder(publish_dir: Path, run: Path) -> Path:
    """Return the folder of a run's weights in one that several runs may share: two may have the same last name."""
    digest = blake2b(str(run.absolute()).encode(), digest_size=4).hexdigest()
    return publish_dir / f"{run.name}-{digest}"


def _broadcast(content):
    """Return on all processes what the first one gives."""
    said = [content]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(said, src=0)
    return said[0]
