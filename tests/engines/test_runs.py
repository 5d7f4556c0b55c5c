"""Runs of reinforcement learning with vLLM servers, as a user starts them: kill -9, and servers that others use too."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.encoding.tokenizer import GlmTokenizer
from model.config import GlmvConfig
from rl.engines.server import Expected, JsonApi
from rl.engines.vllm import VllmServer
from rl.errors import EngineError
from tests.engines.rollout_cases import TOLERANCE
from tests.engines.run_cases import (
    MAX_LENGTH,
    SECONDS,
    STARTED,
    Task,
    complete,
    is_drawing_on,
    make_task,
    nothing_is_left,
    processes_of,
    reach,
    refused,
    served_version,
    start_run,
    start_server,
)
from tests.launch import finish, has_reached, metrics, process_of_rank

pytestmark = pytest.mark.timeout(3600)  # each test starts runs or servers, and machines may be busy

STEPS = 3


@dataclass(frozen=True)
class Served:
    """A task, and a server with its model that is of no run."""

    task: Task
    address: str

    @property
    def rollout(self) -> dict[str, Any]:
        return {"addresses": [self.address]}


@pytest.fixture(scope="module")
def task_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Task]:
    """Return a function that makes the task of a variant, once."""
    return cache(lambda variant: make_task(variant, tmp_path_factory.mktemp(variant)))


@pytest.fixture(scope="module")
def digits_task(task_of: Callable[[str], Task]) -> Task:
    return task_of("glm4v")


@pytest.fixture(scope="module")
def served(digits_task: Task) -> Iterator[Served]:
    process = start_server(digits_task.exported, digits_task.root / "server.log")
    try:
        yield Served(digits_task, process.server.address)
    finally:
        process.close()


def rollouts_of(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"rollouts/step_{step:07d}.jsonl").open()]


def has_rollouts(run: Path, step: int) -> bool:
    return (run / f"rollouts/step_{step:07d}.npz").exists()


def has_scores(run: Path, step: int) -> bool:
    return (run / f"rollouts/step_{step:07d}.jsonl").exists()


def check_run(run: Path, steps: int = STEPS) -> None:
    """Check that every iteration was drawn with the policy's weights, and that the policy has learned something."""
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert sum(line["updates"] for line in lines) >= 2
    for line in lines:
        print({key: line[key] for key in ("step", "reward", "updates", "rollout/tokens", "seconds/rollout")}, end=" ")
        print({key: line.get(key) for key in ("rollout/mismatch", "rollout/max_mismatch", "rollout/reused")})
        if line["updates"]:
            assert line["rollout/max_mismatch"] <= TOLERANCE
        found = rollouts_of(run, line["step"])
        assert {each["version"] for each in found} == {line["step"] - 1}
        assert len(found) == line["rollouts"] == 4 * line["groups/drawn"]
        assert np.mean([each["score"] for each in found]) == pytest.approx(line["reward"])
    assert (run / "quarantine.jsonl").read_text() == ""


# --- servers that the run starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "processes"), [("glm4v", 1), ("glm4v_moe", 2)])
def test_a_server_that_the_run_starts_ends_with_it(
    variant: str, processes: int, task_of: Callable[[str], Task], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = task_of(variant).config(run, rollout=STARTED, train={"steps": STEPS})
    complete(config, processes)
    assert nothing_is_left(config)
    check_run(run)
    validation = [json.loads(line) for line in (run / "validation.jsonl").open()]
    assert [line["step"] for line in validation] == [0, 2, 3]
    assert "Application startup complete" in (run / "servers/0.log").read_text()


@pytest.mark.parametrize(("which", "processes"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2)])
def test_a_server_ends_with_a_run_that_is_ended(
    which: signal.Signals, processes: int, digits_task: Task, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = digits_task.config(run, rollout=STARTED, train={"steps": 1000})
    launcher = start_run(config, processes)
    reach(has_reached, launcher, run, 1)
    assert sum("vllm" in " ".join(each.cmdline()).lower() for each in processes_of(config)) >= 2
    process_of_rank(launcher, 0).send_signal(which)
    output = finish(launcher, SECONDS)
    assert nothing_is_left(config)
    assert ("stopped at step" in output) == (which == signal.SIGTERM)


def test_a_server_that_is_starting_ends_with_a_run_that_is_killed(digits_task: Task, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = digits_task.config(run, rollout=STARTED, train={"steps": STEPS})
    launcher = start_run(config)
    reach(lambda run, step: (run / "servers/0.log").exists(), launcher, run, 0)
    time.sleep(4)
    process_of_rank(launcher, 0).kill()
    finish(launcher, SECONDS)
    assert nothing_is_left(config)


# --- servers that are given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_uses_a_server_and_leaves_it_running(processes: int, served: Served, tmp_path: Path) -> None:
    run = tmp_path / f"run{processes}"
    config = served.task.config(run, rollout=served.rollout, train={"steps": STEPS})
    complete(config, processes)
    check_run(run)
    assert nothing_is_left(config)
    assert re.fullmatch(rf"3 of {run.name}-[0-9a-f]{{8}}", served_version(served.address))  # validation after step 3


def test_a_killed_run_continues_with_the_weights_that_it_should_have(served: Served, tmp_path: Path) -> None:
    """Killed while it draws, when the server then gets weights of another run; and when rollouts are on disk."""
    run = tmp_path / "run"
    more = {"train": {"steps": 4}, "rl": {"prompts": 12, "group": 4, "updates": 2}, "expansion": {"enabled": False}}
    config = served.task.config(run, rollout=served.rollout, **more)
    launcher = start_run(config)
    reach(is_drawing_on(served.address), launcher, run, 2)
    process_of_rank(launcher, 0).kill()
    finish(launcher, SECONDS)
    assert not has_rollouts(run, 2)
    assert has_rollouts(run, 1)
    VllmServer(served.address).load(served.task.exported, "1 of another-run", 120)
    launcher = start_run(config)
    reach(has_scores, launcher, run, 3)
    process_of_rank(launcher, 0).kill()
    finish(launcher, SECONDS)
    assert not has_reached(run, 4)
    scores = run / "rollouts/step_0000003.jsonl"
    lines = scores.read_text().splitlines()
    marked = json.loads(lines[5]) | {"reason": "not scored again"}
    scores.write_text("\n".join([*lines[:5], json.dumps(marked), *lines[6:], ""]))
    drawn = (run / "rollouts/step_0000003.npz").read_bytes()
    output = complete(config)
    check_run(run, 4)
    assert all(metrics(run)[place]["updates"] for place in (1, 3))  # drawn again, and drawn after rollouts from disk
    assert [line["rollout/reused"] for line in metrics(run)] == [0, 0, 1, 0]
    assert "step 3: its 48 rollouts are on disk and are used again, their scores too" in output
    assert (run / "rollouts/step_0000003.npz").read_bytes() == drawn
    assert rollouts_of(run, 3)[5]["reason"] == "not scored again"


def test_weights_of_another_run_end_an_iteration(served: Served, tmp_path: Path) -> None:
    """Another run publishes to the server while it draws. The run that is started again draws with its own weights."""
    run = tmp_path / "run"
    more = {"train": {"steps": 2}, "rl": {"prompts": 24, "group": 4, "updates": 2}, "expansion": {"enabled": False}}
    config = served.task.config(run, rollout=served.rollout, **more)
    launcher = start_run(config)
    reach(is_drawing_on(served.address), launcher, run, 2)
    VllmServer(served.address).load(served.task.exported, "1 of another-run", 120)
    output = finish(launcher, SECONDS)
    assert launcher.returncode != 0
    (error,) = re.findall(r"^error on rank 0: (.*)$", output, re.MULTILINE)
    assert re.match(rf"no server of rollouts is left \({served.address}: it draws with weights of version ", error)
    assert re.search(r"version 1 of another-run, not 1 of run-[0-9a-f]{8}: another run publishes to it", error)
    assert not has_rollouts(run, 2)
    complete(config)
    check_run(run, 2)


def test_a_paused_server_is_used(served: Served, tmp_path: Path) -> None:
    """As a run leaves it that is killed while it publishes."""
    JsonApi(served.address).post("/pause?mode=wait", seconds=60)
    run = tmp_path / "run"
    complete(
        served.task.config(run, rollout=served.rollout, train={"steps": 1}, validation={"interval": 0, "sources": []})
    )
    assert {each["version"] for each in rollouts_of(run, 1)} == {0}


# --- what is refused at start -----------------------------------------------------------------------------------------


def test_a_server_that_takes_fewer_tokens_is_refused(served: Served, tmp_path: Path) -> None:
    config = served.task.config(tmp_path / "run", rollout=served.rollout, train={"seq_length": 2048})
    assert refused(config) == (
        f"{served.address} takes at most 1,024 tokens, and a prompt with its response may have 2,048 in this run "
        "(train.seq_length): start it with --max-model-len 2048"
    )


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("decoder", {"rope_theta": 5e5}, "its text_config.rope_theta is 10000.0, the policy's is 500000.0"),
        ("decoder", {"rms_norm_eps": 1e-6}, "its text_config.rms_norm_eps is 1e-05, the policy's is 1e-06"),
        ("decoder", {"mrope_section": (4, 2, 2)}, r"its text_config.mrope_section is \(2, 3, 3\), the policy's is"),
        ("decoder", {"eos_token_id": (0, 7)}, r"its text_config.eos_token_id is \(0, 7, 9\), the policy's is \(0, 7\)"),
        ("decoder", {"intermediate_size": 640}, "its text_config.intermediate_size is 320, the policy's is 640"),
        ("vision", {"rms_norm_eps": 1e-6}, "its vision_config.rms_norm_eps is 1e-05, the policy's is 1e-06"),
    ],
)
def test_a_server_of_another_model_is_refused(part: str, change: dict[str, Any], message: str, served: Served) -> None:
    """The server is vLLM's, which describes its model with all that transformers fills in."""
    model, tokenizer = GlmvConfig.from_hf(served.task.exported), GlmTokenizer(served.task.exported)
    server = VllmServer(served.address)
    server.check(Expected(model, tokenizer, MAX_LENGTH, 1.0))
    other = replace(model, **{part: replace(getattr(model, part), **change)})
    with pytest.raises(EngineError, match=message):
        server.check(Expected(other, tokenizer, MAX_LENGTH, 1.0))
