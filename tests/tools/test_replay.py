"""tools.replay against the run itself: the same samples, loss and gradient norm, at every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from bs4 import BeautifulSoup
from typer.testing import CliRunner

from data_pipeline.sharding.foreign import index_shards
from tests.data_pipeline.media_files import encoded, pattern
from tests.launch import ROOT, metrics, train
from tests.training_data import config_file, sentence, shards
from tools.replay import app

__all__ = ["config_file", "shards"]

DAMAGED = ("1", "4", "7", "10", "13")


def replay(run: Path, step: int, out: Path, *options: str, processes: int = 1, expect: int = 0) -> Any:
    """Run tools.replay and return what it writes as JSON, or its output if it fails."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["tools.replay", str(run), str(step), "--json", str(out / "replay.json"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return json.loads((out / "replay.json").read_text()) if not expect else done.stderr


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def damaged(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A source in which every third image is truncated."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with wds.TarWriter(str(folder / "photos-000.tar")) as sink:
        for n in range(16):
            image = encoded(pattern(60, 90, seed=n))
            image = image[: len(image) // 2] if str(n) in DAMAGED else image
            sink.write({"__key__": str(n), "json": {"domain": "image_text", "text": sentence(n, 12)}, "0.jpg": image})
    index_shards([folder / "photos-000.tar"], tokenizer=tokenizer_folder)
    return folder


@pytest.mark.parametrize("experts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replay_equals_the_run(config_file: Path, shards: Path, damaged: Path, tmp_path: Path, experts: bool) -> None:
    """A run with expert parallelism, with replaced samples, and steps of which some are worth a warning.

    It is replayed in one process, and over two pipeline stages or with the experts over two processes.
    """
    run = tmp_path / "run"
    options = [
        f"data.sources=[{{path: {damaged}}}, {{path: {shards}/text}}, {{path: {shards}/videos}}]",
        "data.max_quarantined_fraction=1",
        "parallel.expert_model_parallel_size=2",
        "checkpoint.save_interval=1",
        "train.steps=5",
        "optimizer.lr=1e-6",  # so that losses only scatter
        "optimizer.min_lr=1e-6",
        "health.spike_factor=1.00001",
        "health.spike_window=1",
    ]
    train(config_file, options)
    lines = metrics(run)
    quarantined = {json.loads(line)["step"] for line in (run / "quarantine.jsonl").read_text().splitlines()}
    warned = {int(file.stem.removeprefix("step_")) for file in (run / "bad_steps").iterdir()}
    step = min(warned & quarantined)
    listed = json.loads((run / "bad_steps" / f"step_{step:07d}.json").read_text())
    before = state_of(run)

    page = tmp_path / "page.html"
    alone = replay(run, step, tmp_path, "--html", str(page))
    assert alone["loss"] == pytest.approx(lines[step - 1]["loss"], rel=1e-6)
    assert alone["weights"] == f"the weights of {run}/checkpoints/step_{step - 1:07d}"
    assert alone["steps_between"] == 0
    assert [
        [{k: s[k] for k in ("source", "shard", "key", "tokens")} for s in p["samples"]] for p in alone["packs"]
    ] == [pack["samples"] for pack in listed["packs"]]
    for pack in alone["packs"]:
        counted = [s for s in pack["samples"] if s["loss_tokens"]]
        total = sum(s["loss"] * s["loss_tokens"] for s in counted)
        assert pack["loss"] == pytest.approx(total / pack["loss_tokens"], rel=1e-9)
        assert all(s["max_loss"] >= s["loss"] and 0 < s["max_token"] < s["tokens"] for s in counted)
    text = BeautifulSoup(page.read_text(), "lxml").get_text()
    assert all(f"{s['shard']}/{s['key']}" in text for pack in listed["packs"] for s in pack["samples"])

    for layout in ([], ["parallel.expert_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]):
        other = replay(run, step, tmp_path, *layout, processes=2)
        assert other["loss"] == pytest.approx(lines[step - 1]["loss"], rel=1e-6)
        for mine, theirs in zip(other["packs"], alone["packs"], strict=True):
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
            for sample, expected in zip(mine["samples"], theirs["samples"], strict=True):
                assert sample == {
                    name: pytest.approx(value, rel=1e-5) if "loss" in name else value
                    for name, value in expected.items()
                }
    assert state_of(run) == before


def test_gradient_norm_of_a_pack_alone_is_that_of_a_step_of_one_pack(config_file: Path, tmp_path: Path) -> None:
    """Here of adapters with dropout, whose masks are those of the run."""
    run = tmp_path / "run"
    options = ["lora.rank=4", "lora.targets=[all-linear]", "lora.dropout=0.4", "train.global_batch_size=1"]
    train(config_file, [*options, "train.steps=3", "checkpoint.save_interval=2"], processes=1)
    assert_step_of_one_pack(run, 3, tmp_path, f"the weights of {run}/checkpoints/step_0000002")


@pytest.mark.slow
def test_first_step_is_replayed_from_the_weights_that_the_run_started_from(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config_file, ["train.global_batch_size=1", "train.steps=2", "optimizer.warmup_steps=1"], processes=1)
    assert_step_of_one_pack(run, 1, tmp_path, "random weights of seed 1234")
    said = replay(run, 1, tmp_path, "--pack", "1", expect=2)
    assert "error on rank 0: --pack 1: step 1 has the packs 0 to 0" in said


def assert_step_of_one_pack(run: Path, step: int, out: Path, weights: str) -> None:
    replayed = replay(run, step, out)
    line, [pack] = metrics(run)[step - 1], replayed["packs"]
    assert pack["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert pack["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-6)
    assert replayed["weights"] == weights


@pytest.mark.fast
def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path), "3"])
    assert result.exit_code == 2
    assert f"error: {tmp_path} is no run: it has no config.yaml; give the train.output_dir of a run" in result.output
