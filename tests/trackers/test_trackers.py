"""Runs that write to the real Weights & Biases (offline) and MLflow: their files hold the values of metrics.jsonl.

`make test-full` runs this with both packages laid over .venv.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from wandb.proto import wandb_internal_pb2

from tests.launch import finish, has_reached, kill_rank_when, metrics, start, train
from training.trackers import MlflowTracker

Values = dict[int, dict[str, float]]
BLOCK, HEADER = 1 << 15, 7  # of the records of a .wandb file, which is a log of LevelDB
FILE_HEADER = 7  # ":W&B", a magic number, a version


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a run that was written offline."""
    content, position, parts = file.read_bytes(), FILE_HEADER, b""
    while position + HEADER <= len(content):
        if (left := BLOCK - position % BLOCK) < HEADER:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + HEADER])
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_values(run: Path) -> tuple[set[str], Values]:
    """Return the ids of the runs in a folder, and what they hold by step; a later file does not replace a step."""
    ids, values = set(), Values()
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
                line = {key: json.loads(value) for key, value in items.items() if not key.startswith("_")}
                values.setdefault(json.loads(items["_step"]), line)
    return ids, values


def mlflow_values(uri: str) -> tuple[list[Any], Values]:
    """Return the runs, and what the first one holds by step."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("glmv-train")
    runs = client.search_runs([experiment.experiment_id])
    values = Values()
    for key in runs[0].data.metrics:
        for metric in client.get_metric_history(runs[0].info.run_id, key):
            assert key not in values.setdefault(metric.step, {}), f"{key} has two values at step {metric.step}"
            values[metric.step][key] = metric.value
    return runs, values


@pytest.mark.parametrize("earlier", ["killed", "without trackers"])
def test_resumed_run_is_one_run_with_the_values_of_the_metrics(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str
) -> None:
    """Also of the steps that the earlier process had recorded, but not sent."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    uri, run = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    options = ["model.preset=tiny_dense", "train.steps=40", f"train.output_dir={run}", "checkpoint.save_interval=10"]
    trackers = ["metrics.wandb=glm", f"metrics.mlflow={uri}"]
    launcher = start(config_file, options + (trackers if earlier == "killed" else []), processes=1)
    kill_rank_when(has_reached, launcher, run, step=33, rank=0)
    finish(launcher)
    output = train(config_file, [*options, *trackers], processes=1)
    assert output.count("there is no API key") == 1

    expected = {line.pop("step"): line for line in metrics(run)}
    assert sorted(expected) == list(range(1, 41))
    ids, of_wandb = wandb_values(run)
    runs, of_mlflow = mlflow_values(uri)
    known = json.loads((run / "trackers.json").read_text())
    assert ids == {known["wandb"]}
    assert [one.info.run_id for one in runs] == [known["mlflow"]]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["model.preset"] == "tiny_dense"
    for values in (of_wandb, of_mlflow):
        assert sorted(values) == list(range(1, 41))
        for step, line in expected.items():
            assert set(values[step]) == set(line)
            repeatable = {key for key in line if not key.startswith(OWN)}
            for key in line if step > 33 else repeatable:
                assert values[step][key] == pytest.approx(line[key], rel=1e-12), f"{key} of step {step}"


OWN = "step_seconds", "tokens_per_second", "eta_seconds", "data_seconds", "seconds/", "memory_gb", "tflops", "mfu"


def test_validation_that_a_kill_kept_from_mlflow_is_sent_when_it_is_repeated(tmp_path: Path) -> None:
    """The process was killed between the line of step 2 and that of its validation; it resumes from step 1."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    lines = {step: {"step": step, "loss": 3.0 - step, "lr": 0.1} for step in (1, 2, 3)}
    validations = {step: {"step": step, "validation/loss": 4.0 - step} for step in (1, 2)}
    sent = [(1, lines[1]), (1, validations[1]), (2, lines[2])]
    for resumed_at, to_send in ((0, sent), (1, [(2, lines[2]), (2, validations[2]), (3, lines[3])])):
        tracker = MlflowTracker(uri, "glmv-train", tmp_path, resumed_at, keys={})
        for step, line in to_send:
            tracker.step(step, line)
        tracker.close()
    runs, values = mlflow_values(uri)
    assert len(runs) == 1
    assert values == {
        step: {key: value for key, value in {**lines[step], **validations.get(step, {})}.items() if key != "step"}
        for step in lines
    }


def test_server_that_does_not_answer_stops_nothing(config_file: Path, tmp_path: Path) -> None:
    options = ["metrics.mlflow=http://127.0.0.1:9", "train.steps=3", "optimizer.warmup_steps=1"]
    output = train(config_file, [*options, f"train.output_dir={tmp_path}/run"], processes=1)
    assert output.count("mlflow gets no more metrics, metrics.jsonl does:") == 1
    assert len(metrics(tmp_path / "run")) == 3


def test_packages_are_those_of_the_requirements() -> None:
    pinned = (Path(__file__).parent / "requirements.txt").read_text()
    assert f"mlflow_skinny=={mlflow.__version__}\n" in pinned
