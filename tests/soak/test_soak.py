"""Fifty random faults: every run ends complete or with one clear reason, loses no checkpoint, and ends bit for bit.

    python -m pytest -q -s -m slow tests/soak

Each round is a run on two ranks with asynchronous checkpoints, to which ten faults happen one after the other, in an
order and at moments that its seed decides. After each the same command resumes it. The table of all rounds is printed.
"""

from __future__ import annotations

import fcntl
import random
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

import pytest
from omegaconf import OmegaConf

from tests.launch import start, train
from tests.model.test_checkpoint_files import full_file_system
from tests.soak.faults import FAULTS, Fault, Outcome, Run
from tests.soak.poisoned_train import POISON
from tests.training.test_resume import trace
from tests.training.test_saving import files_of_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROUNDS, FAULTS_PER_ROUND = 5, 10
SOURCES = ("images", "text", "videos")
STEPS, INTERVAL = 70, 3
DISK = 320 << 20  # bytes of the file system of the run folder
OPTIONS = [
    f"train.steps={STEPS}",
    "train.deterministic=true",
    "parallel.expert_model_parallel_size=2",
    "checkpoint.async_save=true",
    f"checkpoint.save_interval={INTERVAL}",
    "checkpoint.keep_last=3",
    "health.hang_seconds=20",
    "health.allowance_seconds=120",
    "data.retry_seconds=5",
]
Record = tuple[str, str, float]  # fault, how it ended, seconds


@pytest.fixture(scope="module")
def records() -> Iterator[list[Record]]:
    """Collects what happened, and prints the table of it at the end."""
    made: list[Record] = []
    yield made
    seconds = defaultdict(list)
    for fault, outcome, duration in made:
        seconds[fault, outcome].append(duration)
    print("\n\n| fault | outcome | number | seconds with the restart: mean, longest |\n|---|---|---|---|")
    for (fault, outcome), durations in sorted(seconds.items()):
        print(f"| {fault} | {outcome} | {len(durations)} | {mean(durations):.1f}, {max(durations):.1f} |")


@pytest.fixture(scope="module")
def own_config(
    shards: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Path]:
    """Return a function that copies the shards into a folder and returns the configuration of a run on the copy."""

    def copy(folder: Path) -> Path:
        for name in SOURCES:
            shutil.copytree(shards / name, folder / "shards" / name)
        content = {
            "model": {"preset": "tiny_moe"},
            "data": {
                "tokenizer": str(tokenizer_folder),
                "sources": [{"path": str(folder / "shards" / name)} for name in SOURCES],
                "image_max_tokens": 16,
                "video_max_tokens": 60,
                "num_workers": 1,
            },
            "train": {"global_batch_size": 4, "seq_length": 128, "output_dir": str(folder / "run")},
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
        }
        OmegaConf.save(OmegaConf.create(content), folder / "config.yaml")
        return folder / "config.yaml"

    return copy


@pytest.fixture(scope="module")
def undisturbed(own_config: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(own_config(folder), [*OPTIONS, "checkpoint.save_interval=1000"])
    return folder / "run"


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_run_survives_ten_faults_and_equals_an_undisturbed_one(
    own_config: Callable[[Path], Path],
    undisturbed: Path,
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    config, folder, rng = own_config(tmp_path), tmp_path / "run", random.Random(seed)
    poison = tmp_path / "poison"
    monkeypatch.setenv(POISON, str(poison))
    folder.mkdir()
    with full_file_system(folder, DISK), ExitStack() as stack:
        run = Run(folder, tmp_path / "shards", lambda: launch(config), launch(config), rng, INTERVAL, poison)
        stack.callback(run.kill)
        for name in faults_of_round(seed):
            if run.has_ended:
                run.launcher = run.launch()
            began = time.monotonic()
            ended = suffer(run, FAULTS[name])
            records.append((name, ended, time.monotonic() - began))
            print(f"round {seed}, step {run.step}: {name}: {ended}", flush=True)
        if run.has_ended:
            run.launcher = run.launch()
        output = run.finish()
        assert run.launcher.returncode == 0, output
        assert trace(folder) == trace(undisturbed)
        last = f"step_{STEPS:07d}"
        assert files_of_run(folder)[last] == files_of_run(undisturbed)[last]


def faults_of_round(seed: int) -> list[str]:
    """Deal all kinds of faults out to the rounds, each kind as often as the others, and shuffle those of a round."""
    names = list(FAULTS)
    random.Random(17).shuffle(names)
    first = seed * FAULTS_PER_ROUND
    mine = [names[number % len(names)] for number in range(first, first + FAULTS_PER_ROUND)]
    random.Random(seed).shuffle(mine)
    return mine


def launch(config: Path) -> subprocess.Popen[str]:
    launcher = start(config, OPTIONS, entry="tests.soak.poisoned_train")
    assert launcher.stdout is not None
    fcntl.fcntl(launcher.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)  # nobody reads it before the run has ended
    return launcher


def suffer(run: Run, fault: Fault) -> str:
    """Let a fault happen to a run after some steps. Check how it ends, and where the same command resumes."""
    assert run.wait_for_steps(run.rng.randint(2, 5)), run.finish()
    outcome = fault(run)
    if not outcome.ends:
        assert not run.has_ended, run.finish()
        return "the run continued"
    output = run.finish()
    ended = check_end(run, outcome, output)
    reached, latest = run.step, run.latest
    outcome.undo()
    assert reached - latest <= 2 * INTERVAL, output  # an asynchronous save may be one interval behind
    starts = len(starting_steps(run))
    run.launcher = run.launch()
    resumes_from = [int(path.name.removeprefix("step_")) for path in run.saved]
    expected = max([step for step in resumes_from if step <= latest and step not in outcome.lost], default=0)
    assert run.wait(lambda: len(starting_steps(run)) > starts), run.finish()
    assert starting_steps(run)[-1] == expected, output
    for damaged in (run.folder / "checkpoints").glob("*.damaged"):
        shutil.rmtree(damaged)
    return ended


def check_end(run: Run, outcome: Outcome, output: str) -> str:
    """Check that a run ended with one clear reason, or stopped as asked with nothing lost; say which."""
    reasons = set(re.findall(r"^error(?: on rank \d+)?: (.*)$", output, re.MULTILINE))
    assert "training/loop.py" not in output, output  # no stack trace but the launcher's own
    assert run.launcher.returncode != 0, output
    if not outcome.reason:
        assert not reasons, output
        assert "the same command resumes" in output, output
        assert run.latest == run.step, output
        return "stopped, nothing lost"
    assert len(reasons) == 1, output
    assert re.search(outcome.reason, *reasons), output
    return "ended with one reason, resumed"


def starting_steps(run: Run) -> list[int]:
    """Return the step that each start so far has resumed from."""
    log = run.folder / "log.txt"
    return [int(step) for step in re.findall(r"step (\d+) of \d+, from ", log.read_text())] if log.exists() else []
