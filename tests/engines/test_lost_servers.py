"""Two vLLM servers, of which one is killed or stopped while it draws."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rl.engines.servers import ServersEngine
from rl.rollouts import RolloutPrompt
from tests.engines.engine_folders import exported_folder
from tests.engines.rollout_cases import (
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

pytestmark = pytest.mark.timeout(1800)  # three servers start, and machines may be busy

DEADLINE = 120.0


@pytest.fixture(scope="module")
def case(
    single_process: None, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServersEngine, TrainStep, list[RolloutPrompt]]]:
    root = tmp_path_factory.mktemp("lost")
    folder = exported_folder("GLM-4.1V", tokenizer_folder, root)
    trainer = make_trainer("glm4v", str(folder), "")
    engine = make_engine("glm4v", folder, root / "run", start=2, deadline=DEADLINE, health_seconds=5.0, concurrency=16)
    try:
        engine.publish(trainer, 0)
        yield engine, trainer, image_prompts("glm4v", folder)
    finally:
        engine.close()


def send(family: list[psutil.Process], which: signal.Signals) -> None:
    for each in family:
        each.send_signal(which)


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSTOP])
def test_the_other_server_completes_the_iteration(
    which: signal.Signals, case: tuple[ServersEngine, TrainStep, list[RolloutPrompt]], caplog: pytest.LogCaptureFixture
) -> None:
    """And the lost server is started again before the next publication."""
    engine, trainer, prompts = case
    servers = server_processes()
    assert len(servers) == 2
    address, process = next(iter(servers.items()))
    family = [process, *process.children(recursive=True)]
    threading.Timer(1.5, send, args=(family, which)).start()
    start = time.monotonic()
    rollouts = engine.generate(requests_of(prompts, 1, group=6), SAMPLING)
    seconds = time.monotonic() - start
    print(f"{which.name}: {len(rollouts)} rollouts in {seconds:.1f} s; {caplog.messages}")
    assert 1.5 < seconds < DEADLINE
    assert len(rollouts) == 6 * len(prompts)
    assert engine.quarantined == {}
    assert gap(trainer, prompts, rollouts[::4])[0] <= TOLERANCE
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"rollouts: {address} is lost (")
    assert "rollouts go to 1 other server" in caplog.messages[0]
    engine.publish(trainer, 1)
    assert len(server_processes()) == 2
    assert address not in server_processes()
    rollouts = engine.generate(requests_of(prompts, 2), SAMPLING)
    assert {each.version for each in rollouts} == {1}
    assert gap(trainer, prompts, rollouts[::4])[0] <= TOLERANCE


def test_a_server_that_is_killed_between_iterations_is_started_again(
    case: tuple[ServersEngine, TrainStep, list[RolloutPrompt]], caplog: pytest.LogCaptureFixture
) -> None:
    engine, trainer, _ = case
    address, process = next(iter(server_processes().items()))
    send([process, *process.children(recursive=True)], signal.SIGKILL)
    engine.publish(trainer, 2)
    reason = r"(it has ended|no answer to /health within 5 s)"
    assert re.fullmatch(rf"rollouts: {address} is lost \({reason}\); it is started again", "\n".join(caplog.messages))
    assert len(server_processes()) == 2


def test_servers_end_with_the_engine(case: tuple[ServersEngine, TrainStep, list[RolloutPrompt]]) -> None:
    engine, _, _ = case
    family = [each for server in server_processes().values() for each in (server, *server.children(recursive=True))]
    assert len(family) >= 4
    engine.close()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
