"""Runs with router replay of a tiny mixture of experts: their routing is kept on disk, and used again after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from demo.digits import build
from rl.rollouts import read_rollouts
from tests.launch import finish, metrics, process_of_rank, start, train, wait_until
from tests.rl.digit_runs import learn_to_answer
from tests.rl.run_files import ENTRY, assert_same, has_rollouts, kill_and_resume

pytestmark = pytest.mark.slow
ROUTER_REPLAY = {"rollout": {"router_replay": "engine"}}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in conftest.py, in the form of a mixture of experts."""
    folder = tmp_path_factory.mktemp("digits")
    build(folder, chats=48, prompts=64, held_out=16, chat_form="glm45v")
    return folder


@pytest.fixture(scope="session")
def start_model(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("start") / "run"
    learn_to_answer(digits, run, "model.preset=tiny_moe")
    return run


@pytest.fixture(scope="module")
def whole_run(rl_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(rl_config(run, **ROUTER_REPLAY), entry=ENTRY, processes=1)
    return run


def test_experts_of_every_token_are_on_disk(whole_run: Path) -> None:
    learned = 0
    for line in metrics(whole_run):
        _, rollouts = read_rollouts(whole_run / "rollouts" / f"step_{line['step']:07d}.npz")
        assert len(rollouts) == line["rollouts"]
        for rollout in rollouts:
            assert rollout.experts is not None
            assert len(rollout.experts.response) == len(rollout.tokens)
            read = np.concatenate([rollout.experts.prompt, rollout.experts.response[:-1]])
            assert read.max() < 8
            assert (np.diff(np.sort(read)) > 0).all(), "the experts of a token must differ"
            assert (rollout.experts.response[-1] == 255).all()
        learned += line["updates"]
        assert line["rollout/mismatch"] < 1e-5
    assert learned


def test_killed_run_continues_bit_for_bit(whole_run: Path, rl_config: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    after_rollouts = lambda launcher: wait_until(has_rollouts, launcher, run, step=3)  # noqa: E731
    kill_and_resume(rl_config(run, **ROUTER_REPLAY), after_rollouts)
    assert_same(run, whole_run)
    assert metrics(run)[2]["rollout/reused"] == 1


def test_rollouts_without_experts_are_drawn_again(rl_config: Callable[..., Path], tmp_path: Path) -> None:
    """A run is killed in its first iteration, and begins again with router replay."""
    run = tmp_path / "run"
    launcher = start(rl_config(run), entry=ENTRY, processes=1)
    wait_until(has_rollouts, launcher, run, step=1)
    process_of_rank(launcher, 0).kill()
    finish(launcher)
    file = run / "rollouts" / "step_0000001.npz"
    assert "response_experts" not in np.load(file).files
    train(rl_config(run, **ROUTER_REPLAY), ["train.steps=1"], entry=ENTRY, processes=1)
    assert metrics(run)[0]["rollout/reused"] == 0
    assert "response_experts" in np.load(file).files
