"""Kill -9 at random moments, in one process and two: the run that resumes is the one that nothing disturbs."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.launch import finish, process_of_rank, start, train
from tests.rl.run_files import ENTRY, assert_same

pytestmark = pytest.mark.slow

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
LOST = r"error: .*(is gone: it was killed|the connection to .* is lost)"  # what a survivor says of a killed process


@pytest.mark.parametrize(("processes", "layout"), [(1, []), (2, []), (2, TP2)], ids=["1 process", "DP2", "TP2 SP"])
def test_run_killed_at_ten_random_moments_continues_bit_for_bit(
    rl_config: Callable[..., Path], tmp_path: Path, processes: int, layout: list[str]
) -> None:
    """A kill comes after 0.4 to 1 of the time of a whole run, of which the start takes about half."""
    whole, run, rng, kills = tmp_path / "whole", tmp_path / "run", random.Random(1), 0
    started = time.monotonic()
    train(rl_config(whole), layout, entry=ENTRY, processes=processes)
    seconds = time.monotonic() - started
    config = rl_config(run, checkpoint={"save_interval": 1})
    while kills < 10:
        launcher = start(config, layout, entry=ENTRY, processes=processes)
        time.sleep(seconds * rng.uniform(0.4, 1))
        with suppress(KeyError, psutil.NoSuchProcess):  # it has not begun, or has ended
            process_of_rank(launcher, rng.randrange(processes)).kill()
            kills += 1
        output = finish(launcher)
        if launcher.returncode == 0:  # begin again from the first iterations
            assert_same(run, whole)
            shutil.rmtree(run)
            continue
        errors = re.findall(r"^error.*", output, re.MULTILINE)
        assert all(re.match(LOST, error) for error in errors), output
        reached = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
        print(f"kill {kills}: {reached} iterations were done")
    train(config, layout, entry=ENTRY, processes=processes)
    assert_same(run, whole)
