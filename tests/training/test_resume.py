"""A run that is killed and started again resumes bit for bit."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.config import SourceConfig
from model.config import GlmvConfig
from tests.launch import fail, finish, has_reached, is_saving, kill_rank_when, metrics, start, train
from training.config import RunConfig, load_config
from training.run_state import FAILED, RUN_STATE
from training.setup import build_loader

EXPERTS_OVER_TWO = ["parallel.expert_model_parallel_size=2"]
FOUR_STAGES = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
OWN = "step_seconds", "tokens_per_second", "eta_seconds", "data_seconds", "seconds/", "memory_gb", "tflops", "mfu"


def trace(run: Path) -> list[dict[str, object]]:
    """Return the metrics that must not differ; times and memory may."""
    return [{key: value for key, value in line.items() if not key.startswith(OWN)} for line in metrics(run)]


def stored_tensors(run: Path) -> dict[str, object]:
    """Return the checksums of weights and optimizer state in the checkpoint of step 6."""
    files = json.loads((run / "checkpoints" / "step_0000006" / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


KILLS = [
    # layout, precision, rank to kill, when, restarts by torchrun itself
    (EXPERTS_OVER_TWO, "fp32", 1, has_reached, 5, 1),
    (EXPERTS_OVER_TWO, "bf16", 0, is_saving, 6, 0),
    (FOUR_STAGES, "fp32", 1, has_reached, 5, 0),
]


@pytest.mark.parametrize(("layout", "precision", "rank", "condition", "step", "max_restarts"), KILLS)
def test_killed_and_restarted_run_equals_an_uninterrupted_one(
    config_file: Path,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    layout: list[str],
    precision: str,
    rank: int,
    condition: Callable[[Path, int], bool],
    step: int,
    max_restarts: int,
) -> None:
    common = [*layout, f"train.precision={precision}", "train.deterministic=true"]
    whole = undisturbed(config_file, *common)

    killed = tmp_path / "killed"
    profiled = ["profile.start=5", "profile.steps=2", "profile.ranks=[0,1]", "metrics.peak_tflops=0.5"]
    command = [*common, *profiled, f"train.output_dir={killed}"]
    launcher = start(config_file, command, max_restarts=max_restarts)
    kill_rank_when(condition, launcher, killed, step=step, rank=rank)
    output = finish(launcher)
    assert re.findall("^error.*", output, re.MULTILINE) == [
        line
        for line in output.splitlines()
        if re.match(rf"error: rank {rank} \(process \d+ on \S+\) is gone: it was", line)
    ]
    assert "training/loop.py" not in output  # no stack trace
    if not max_restarts:
        assert launcher.returncode != 0
        assert (killed / "checkpoints" / "latest").read_text() == "step_0000003\n"
        output = train(config_file, command)

    assert "step 3 of 6" in output
    assert trace(killed) == trace(whole)  # the profiler, too, changes no bit
    assert stored_tensors(killed) == stored_tensors(whole)
    for number in (0, 1):
        with gzip.open(killed / "profile" / f"rank_{number}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"step 5", "step 6", "aten::mm"} <= names
        assert "step 4" not in names
    assert [line["step"] for line in metrics(killed)] == [1, 2, 3, 4, 5, 6]


def test_process_killed_while_the_checkpoint_is_loaded_is_named(config_file: Path, tmp_path: Path) -> None:
    """Nothing is said against the checkpoint, and the run has not failed: it is to be started again."""
    options = [f"train.output_dir={tmp_path}/run", "checkpoint.save_interval=3"]
    train(config_file, [*options, "train.steps=3"])
    launcher = start(config_file, [*options, "train.steps=4"], entry="tests.training.lost_while_loading_train")
    output = finish(launcher)
    assert launcher.returncode != 0
    [error] = re.findall("^error.*", output, re.MULTILINE)
    assert re.match(r"error: (rank 1 .* is gone: it was|the connection to .* is lost)", error), output
    assert json.loads((tmp_path / "run" / RUN_STATE).read_text())["state"] != FAILED
    assert "step 3 of 4" in train(config_file, [*options, "train.steps=4"])


def test_run_resumes_at_another_layout(config_file: Path, tmp_path: Path) -> None:
    """Expert parallel, then tensor parallel, then one process: always the losses of one process, to rounding."""
    train(config_file, [f"train.output_dir={tmp_path}/one", "checkpoint.save_interval=0"], processes=1)
    moved = [f"train.output_dir={tmp_path}/moved", "checkpoint.save_interval=2"]
    train(config_file, [*moved, "train.steps=6", *EXPERTS_OVER_TWO])
    set_back_to(tmp_path / "moved", step=2)
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    train(config_file, [*moved, *layout])
    set_back_to(tmp_path / "moved", step=4)
    train(config_file, moved, processes=1)
    for moved_line, line in zip(metrics(tmp_path / "moved"), metrics(tmp_path / "one"), strict=True):
        assert moved_line["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert moved_line["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


def test_run_resumes_over_a_damaged_shard_to_the_end_of_the_data(
    config_file: Path, shards: Path, tmp_path: Path
) -> None:
    """Two epochs, begun on four pipeline stages; then half of a shard is overwritten.

    Two data-parallel ranks with two workers each resume to the end, with the samples that the loader gives in one
    process.
    """
    images, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(shards / "images", images)
    sources = [SourceConfig(str(images), epochs=2), SourceConfig(str(shards / "text"), epochs=2)]
    listed = ", ".join(f"{{path: {source.path}, epochs: 2}}" for source in sources)
    common = [f"data.sources=[{listed}]", "data.max_quarantined_fraction=0.5"]
    config = load_config(RunConfig, config_file, [*common, "data.num_workers=0"])
    loader = build_loader(config, GlmvConfig.from_preset(config.model.preset))

    train(config_file, [*common, *FOUR_STAGES, "train.steps=3"])
    expected = [loader.next_step() for _ in range(3)]
    [shard] = images.glob("*.tar")
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 4)
        file.write(random.Random(0).randbytes(shard.stat().st_size // 2))
    output = train(config_file, [*common, "data.num_workers=2", "train.steps=1000"])
    expected += list(iter(loader.next_step, []))

    last = len(expected)
    assert 5 < last < 100
    assert f"the data ends here: all sources have used up their epochs before step {last + 1}" in output
    assert (run / "checkpoints" / "latest").read_text() == f"step_{last:07d}\n"
    counts = [
        [sum(getattr(pack, f"num_{name}") for pack in packs) for name in ("tokens", "samples", "images", "patches")]
        for packs in expected
    ]
    assert [[line[name] for name in ("tokens", "samples", "images", "patches")] for line in metrics(run)] == counts
    lost = [{"step": n + 1, **r} for n, packs in enumerate(expected) for pack in packs for r in pack.quarantined]
    assert [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()] == lost
    assert {record["reason"] for record in lost} == {"checksum"}
    assert min(record["step"] for record in lost) > 3


def test_run_resumes_from_shards_and_a_tokenizer_that_were_moved(
    config_file: Path, shards: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Without checkpoint.allow_changes, and as if nothing had moved. Other samples at the new path are refused."""
    names = ("images", "text")
    for name in names:
        shutil.copytree(shards / name, tmp_path / "before" / name)
    before, after = (
        f"data.sources=[{{path: {tmp_path}/{folder}/images}}, {{path: {tmp_path}/{folder}/text}}]"
        for folder in ("before", "after")
    )
    common = ["train.deterministic=true", "checkpoint.save_interval=2"]
    train(config_file, [*common, before, "train.steps=4", f"train.output_dir={tmp_path}/whole"], processes=1)

    moved = [*common, "train.steps=4", f"train.output_dir={tmp_path}/run"]
    train(config_file, [*moved, before], processes=1)
    set_back_to(tmp_path / "run", step=2)
    (tmp_path / "before").rename(tmp_path / "after")
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    output = train(config_file, [*moved, after, f"data.tokenizer={tmp_path}/tokenizer"], processes=1)
    for name in names:
        assert f"source '{name}' has moved from {tmp_path}/before/{name} to {tmp_path}/after/{name}" in output
    assert f"data.tokenizer has moved from {tokenizer_folder} to {tmp_path}/tokenizer" in output
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")

    set_back_to(tmp_path / "run", step=2)
    shutil.rmtree(tmp_path / "after" / "text")
    shutil.copytree(shards / "videos", tmp_path / "after" / "text")
    [error] = fail(config_file, [*moved, after], processes=1)
    assert error.startswith("the samples of source 'text', or the pixel budgets, have changed since the checkpoint")


def set_back_to(run: Path, step: int) -> None:
    """Make an earlier checkpoint the latest, as if the run had been stopped there."""
    (run / "checkpoints" / "latest").write_text(f"step_{step:07d}\n")
