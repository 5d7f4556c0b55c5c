"""--dry-run shows what a run would do, and touches nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError
from model.rank_sizes import parameters_by_rank
from tests.launch import ROOT
from tests.model.layout_cases import layout_of
from tests.processes import Processes
from tests.reference import small_config
from tests.training import step_cases
from tests.training.step_cases import case_of
from training.config import RunConfig, load_config
from training.dry_run import dry_run, one_stage, rank_bytes
from training.launch import main


@pytest.fixture
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group was started"))


def shown(
    config: Path, capsys: pytest.CaptureFixture[str], *overrides: str, world: int | None = None, skip: bool = False
) -> str:
    dry_run(load_config(RunConfig, config, overrides), world, skip)
    return capsys.readouterr().out


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of everything under a folder."""
    stats = {str(path): path.stat() for path in [folder, *folder.rglob("*")]}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.usefixtures("no_process_group")
def test_everything_is_shown_and_nothing_is_touched(
    config_file: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path), snapshot(shards)
    output = shown(
        config_file,
        capsys,
        "parallel.pipeline_model_parallel_size=2",
        "parallel.expert_model_parallel_size=2",
        "optimizer.lr_scale.vision=0.5",
        "freeze=[vision]",
        world=8,
    )
    assert (snapshot(tmp_path), snapshot(shards)) == before
    assert "step 0 of 6, from random weights, seed 1234" in output
    assert "8 processes: TP 1 x CP 1 x PP 2 x DP 4; experts: EP 2 x ETP 1" in output
    assert "4 of 128 tokens per step, 1 on each data-parallel rank" in output
    assert re.search(r"^rank +holds +share", output, re.MULTILINE)  # the pipeline table
    assert re.search(r"^image_text +\d+ ", output, re.MULTILINE)  # the mixture
    assert "warning: optimizer.lr_scale.vision has no effect, because freeze names vision" in output
    assert "warning: source 'videos' has only 3 samples" in output


def test_command_line_needs_no_run_folder_and_no_torchrun(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config_file), "--dry-run"]
    environment = {**os.environ, "WORLD_SIZE": "3"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: train.global_batch_size=4 is not a multiple of the 3 data-parallel ranks that 3 processes make"
    )
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


WRONG = [
    # overrides, world size, message
    (
        ["parallel.pipeline_model_parallel_size=2"],
        None,
        r"pipeline_model_parallel_size=2 does not divide the 1 p",
    ),
    (["parallel.expert_model_parallel_size=8"], 12, r"expert_model_parallel_size=8 does not divide the 12 processes"),
    (
        ["model.init_from=/nowhere"],
        1,
        r"model.init_from=/nowhere: there is no such folder; run the stage",
    ),
    (["data.root=/nowhere", "data.sources=[{path: x}]"], 1, r"/nowhere/x"),
]


@pytest.mark.parametrize(("overrides", "world", "message"), WRONG)
def test_what_a_run_would_refuse_is_refused(
    config_file: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], world: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):  # the base of ConfigError and DataError
        shown(config_file, capsys, *overrides, world=world)
    assert capsys.readouterr().out == ""


def test_world_size_that_is_no_number_is_refused(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE='many' in the environment is no number of processes"):
        shown(config_file, capsys)


def test_files_may_be_missing_when_they_are_skipped(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ("data.tokenizer=/nowhere", "data.root=/nowhere", "data.sources=[{path: x}]")
    output = shown(config_file, capsys, *missing, "model.init_from=/nowhere", skip=True)
    assert "not opened (--skip-files): the data, its tokenizer and model.init_from=/nowhere." in output
    with pytest.raises(ConfigError, match=r"--skip-files needs model.preset"):
        shown(config_file, capsys, "model.preset=", "model.init_from=/nowhere", skip=True)


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("options", [["--world-size", "2"], ["--skip-files"]])
def test_options_of_a_dry_run_alone_are_refused(
    config_file: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.train", "--config", str(config_file), *options])
    with pytest.raises(SystemExit) as ended:
        main(RunConfig, "")
    assert ended.value.code == 2
    assert "error: --world-size and --skip-files belong to --dry-run; add it, or remove them" in capsys.readouterr().err


class Command:
    """What a checkpoint of a stranger may hold: unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_header_of_a_checkpoint_is_read_without_running_it(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mark = tmp_path / "stranger", tmp_path / "ran"
    (folder / "state").mkdir(parents=True)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(GlmvConfig.from_preset("tiny_moe").to_hf()))
    (folder / "state" / ".metadata").write_bytes(pickle.dumps(Command(mark)))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.mkdir, which no checkpoint needs"):
        shown(config_file, capsys, f"model.init_from={folder}")
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
@pytest.mark.parametrize("layout", ["EP2", "TP2 SP"])
def test_bytes_are_those_of_the_objects_of_a_run(hf_folder, config_file: Path, layout: str) -> None:
    """Two real ranks after a step. The optimizer's state is not spread evenly to the byte, so it is summed."""
    with Processes(2) as processes:
        ranks = processes.run(step_cases.bytes_held, layout=layout, **case_of(hf_folder))
    config, model = load_config(RunConfig, config_file), small_config(case_of(hf_folder)["variant"])
    config.parallel, _ = layout_of(layout)
    [held] = parameters_by_rank(model, config.parallel, one_stage(model))
    counted = rank_bytes(config, held, Counter(), processes=2)
    assert [(rank["weights"], rank["gradients"]) for rank in ranks] == [(counted.weights, counted.gradients)] * 2
    assert sum(rank["optimizer"] for rank in ranks) == 2 * counted.optimizer


def test_held_out_data_that_is_also_trained_on_is_counted(
    config_file: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the start of the run's log counts it."""
    output = shown(config_file, capsys, "validation.interval=2", f"validation.sources=[{{path: {shards / 'chats'}}}]")
    assert "validation: 12 samples in 1 shards are held out\n" in output
    assert "validation: 12 of these samples have a record, image or video that is also in the training data" in output
