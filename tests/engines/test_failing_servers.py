"""Two vLLM servers that are stopped and killed: at first contact, while they load or draw, and between iterations."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from data_pipeline.encoding.tokenizer import GlmTokenizer
from rl.engines.prompt_media import served_prompt
from rl.engines.server import Draw, ServerGone
from rl.engines.servers import ServersEngine
from rl.engines.vllm import VllmServer
from rl.engines.vllm_process import VllmProcess
from rl.errors import EngineError
from rl.rollouts import RolloutPrompt
from tests.engines.engine_folders import ENGINES, exported_folder
from tests.engines.rollout_cases import (
    MAX_LENGTH,
    OPTIONS,
    SAMPLING,
    TOLERANCE,
    gap,
    image_prompts,
    make_engine,
    requests_of,
    server_processes,
)
from tests.model.layout_cases import make_trainer
from training.step import TrainStep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # two servers start, and machines may be busy

HEALTH = 10.0  # seconds


@dataclass(frozen=True)
class Case:
    """A policy, and two servers of it."""

    folder: Path
    trainer: TrainStep
    prompts: list[RolloutPrompt]
    addresses: list[str]
    families: list[list[psutil.Process]]
    make: Callable[[], ServersEngine]

    def send(self, number: int, which: signal.Signals) -> None:
        for each in self.families[number]:
            each.send_signal(which)


@pytest.fixture(scope="module")
def case(single_process: None, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("failing")
    folder = exported_folder("GLM-4.1V", tokenizer_folder, root)
    servers = [VllmProcess(str(ENGINES), folder, MAX_LENGTH, OPTIONS, root / f"{n}.log") for n in range(2)]
    try:
        for each in servers:
            each.wait(900.0, lambda: None)
        addresses = [each.server.address for each in servers]
        processes = [server_processes()[address] for address in addresses]
        families = [[process, *process.children(recursive=True)] for process in processes]
        limits = {"start": 0, "start_python": "", "start_options": [], "start_seconds": 900.0, "concurrency": 16}

        def make() -> ServersEngine:
            given = {"addresses": addresses, "deadline": 300.0, "health_seconds": HEALTH, **limits}
            return make_engine("glm4v", folder, root / "run", **given)

        policy, prompts = make_trainer("glm4v", str(folder), ""), image_prompts("glm4v", folder)
        yield Case(folder, policy, prompts, addresses, families, make)
    finally:
        for each in servers:
            each.close()


def test_servers_that_fail_cost_one_line_each(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """One story, because servers start slowly."""
    address, last = case.addresses
    case.send(0, signal.SIGSTOP)
    with pytest.raises(EngineError, match=rf"rollout\.addresses: {address} does not answer \(no answer within 60 s\)"):
        case.make()
    case.send(0, signal.SIGCONT)
    engine = case.make()
    engine.publish(case.trainer, 0)
    assert caplog.messages == []

    def draws(version: int, group: int = 1) -> None:
        rollouts = engine.generate(requests_of(case.prompts[:8], version, group), SAMPLING)
        assert {each.version for each in rollouts} == {version}
        assert len(rollouts) == 8 * group
        assert gap(case.trainer, case.prompts, rollouts)[0] <= TOLERANCE

    def said(*lines: str) -> None:
        print(caplog.messages)
        assert len(caplog.messages) == len(lines)
        assert all(line.startswith(start) for line, start in zip(caplog.messages, lines, strict=True))
        caplog.clear()

    def while_it_loads(which: signal.Signals) -> None:
        """Let the first server wait at its pause for a long response, and then send it a signal."""
        prompt = served_prompt(case.prompts[0], GlmTokenizer(case.folder))
        threading.Thread(target=draw_long, args=(VllmServer(address), Draw(prompt, (), 1200, 1, 1.0, ()))).start()
        time.sleep(0.5)
        threading.Timer(1.0, case.send, args=(0, which)).start()

    while_it_loads(signal.SIGSTOP)
    start = time.monotonic()
    engine.publish(case.trainer, 1)
    assert 1.0 < time.monotonic() - start < 60.0  # of a deadline of 300
    said(f"rollouts: {address} is lost (no answer to /health within {HEALTH:g} s while it loads weights)")
    draws(1)
    engine.publish(case.trainer, 2)  # it still hangs
    draws(2)
    said()
    case.send(0, signal.SIGCONT)
    engine.publish(case.trainer, 3)
    said(f"rollouts: {address} takes part again")
    draws(3, group=8)
    said()

    while_it_loads(signal.SIGKILL)
    engine.publish(case.trainer, 4)
    said(f"rollouts: {address} is lost (ConnectionError")
    draws(4)
    with pytest.raises(EngineError, match=rf"rollout\.addresses: {address} does not answer \(ConnectionError\): start"):
        case.make()

    threading.Timer(0.5, case.send, args=(1, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match=rf"no server of rollouts is left \({address}: .*; {last}: .*\): start the s"):
        engine.generate(requests_of(case.prompts, 5, 8), replace(SAMPLING, temperature=0.0))  # as a validation
    assert len(caplog.messages) == 1
    with pytest.raises(EngineError, match=rf"no server took the weights of version 5: {address}: .*; {last}: "):
        engine.publish(case.trainer, 5)


def draw_long(server: VllmServer, draw: Draw) -> None:
    with suppress(ServerGone):
        server.draw(draw, 120.0)
