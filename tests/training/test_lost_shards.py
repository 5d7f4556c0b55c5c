"""A run whose shards vanish while it trains: the same losses if they come back in time, else one clear reason."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import webdataset as wds

from data_pipeline.sharding.foreign import index_shards
from tests.launch import finish, has_reached, metrics, process_of_rank, start, train, wait_until
from tests.training_data import sentence

SHARDS = 60  # more than are read together, so that some are opened late


def has_warned(run: Path, _step: int) -> bool:
    return "cannot be read (No such file or directory); trying again" in (run / "log.txt").read_text()


def move_unopened(folder: Path, launcher: subprocess.Popen[str]) -> dict[Path, Path]:
    """Rename the shards that no process of the run has open, and return {where they are: where they were}."""
    processes = psutil.Process(launcher.pid).children(recursive=True)
    opened = {Path(file.path) for process in processes for file in process.open_files()}
    moved = {path.with_suffix(".away"): path for path in sorted(folder.glob("*.tar")) if path not in opened}
    for away, path in moved.items():
        path.rename(away)
    return moved


def make_shards(folder: Path, tokenizer_folder: Path) -> Path:
    folder.mkdir()
    for number in range(SHARDS):
        with wds.TarWriter(str(folder / f"many-{number:03d}.tar")) as sink:
            for n in range(2):
                record = {"domain": "text", "text": sentence(2 * number + n, 30)}
                sink.write({"__key__": f"{number}-{n}", "json": record})
    index_shards(sorted(folder.glob("*.tar")), tokenizer=tokenizer_folder)
    return folder


@pytest.mark.slow
def test_run_waits_for_shards_that_are_moved_away_and_back(
    config_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = make_shards(tmp_path / "many", tokenizer_folder)
    common = [f"data.sources=[{{path: {folder}}}]", "train.steps=20", "checkpoint.save_interval=0"]
    train(config_file, [*common, f"train.output_dir={tmp_path}/whole"], processes=1)

    run = tmp_path / "run"
    launcher = start(config_file, [*common, "data.retry_seconds=120"], processes=1)
    wait_until(has_reached, launcher, run, step=1)
    moved = move_unopened(folder, launcher)
    wait_until(has_warned, launcher, run, step=0)
    for away, path in moved.items():
        away.rename(path)
    output = finish(launcher)
    assert launcher.returncode == 0, output
    assert re.search(r"shard .*many-\d+\.tar is back after \d+ seconds", (run / "log.txt").read_text())
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(tmp_path / "whole")]
    assert not (run / "quarantine.jsonl").read_text()

    shutil.rmtree(run)
    launcher = start(config_file, [*common, "data.retry_seconds=1"], processes=1)
    wait_until(has_reached, launcher, run, step=1)
    move_unopened(folder, launcher)
    output = finish(launcher)
    assert launcher.returncode != 0
    [error] = re.findall(r"^error on rank 0: (.*)$", output, re.MULTILINE)
    assert re.match(r"a shard of source 'many' is lost: .*many-\d+\.tar cannot be opened \(No such file", error)
    assert "data.on_lost_shard=quarantine" in error


@pytest.mark.slow
def test_run_that_waits_for_shards_stops_within_seconds_and_resumes(
    config_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Both ranks wait, one of them gets a signal, with the time of a scheduler: half a minute."""
    folder = make_shards(tmp_path / "many", tokenizer_folder)
    common = [f"data.sources=[{{path: {folder}}}]", "train.steps=20", "checkpoint.save_interval=1000"]
    train(config_file, [*common, f"train.output_dir={tmp_path}/whole"])
    run = tmp_path / "run"
    launcher = start(config_file, [*common, "data.retry_seconds=120"])
    wait_until(has_reached, launcher, run, step=1)
    moved = move_unopened(folder, launcher)
    wait_until(has_warned, launcher, run, step=0)
    time.sleep(5)  # until the packs that were fetched ahead are used up
    process_of_rank(launcher, 1).send_signal(signal.SIGUSR1)
    output = finish(launcher, timeout=60)
    assert re.search(r"stopped at step \d+ by SIGUSR1 on rank 1; the same command resumes", output), output
    for away, path in moved.items():
        away.rename(path)
    train(config_file, common)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(tmp_path / "whole")]
