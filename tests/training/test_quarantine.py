"""Samples that cannot be read are replaced and written down, and the run continues, the same in every layout.

A run ends when too many samples cannot be used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import webdataset as wds

from data_pipeline.sharding.foreign import index_shards
from tests.data_pipeline.media_files import encoded, pattern
from tests.launch import finish, has_reached, metrics, start, train, wait_until
from tests.training_data import sentence

DAMAGED = {"3", "11"}
LAYOUTS = {
    "DP2": [],
    "PP2 VPP2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    "CP2": ["parallel.context_parallel_size=2"],
}
COUNTS = ("step", "tokens", "samples", "images", "patches", "padding_fraction", "lr")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A source in which some images are truncated. Their headers are complete, so only decoding can tell."""
    folder = tmp_path_factory.mktemp("foreign")
    with wds.TarWriter(str(folder / "images-000.tar")) as sink:
        for n in range(16):
            image = encoded(pattern(60, 90, seed=n))
            record = {"domain": "image_text", "text": sentence(n, 12)}
            sink.write(
                {"__key__": str(n), "json": record, "0.jpg": image[: len(image) // 2] if str(n) in DAMAGED else image}
            )
    index_shards([folder / "images-000.tar"], tokenizer=tokenizer_folder)
    return folder


def test_truncated_images_are_quarantined_and_counted_in_every_layout(
    config_file: Path, shards: Path, images: Path, tmp_path: Path
) -> None:
    common = [
        f"data.sources=[{{path: {images}}}, {{path: {shards}/text}}, {{path: {shards}/videos}}]",
        "checkpoint.save_interval=0",
    ]
    one = tmp_path / "one"
    train(config_file, [*common, f"train.output_dir={one}"], processes=1)
    assert {record["key"] for record in quarantined(one)} == DAMAGED
    for record in quarantined(one):
        assert record["shard"] == "images-000.tar"
        assert record["reason"]
        assert record["replaced_by"].startswith("images-000.tar/")
        assert record["replaced_by"].partition("/")[2] not in DAMAGED
        assert 1 <= record["step"] <= 6
    assert len(metrics(one)) == 6
    assert re.search(r"quarantined \d+ samples at step \d; see quarantine.jsonl", (one / "log.txt").read_text())

    for layout, sizes in LAYOUTS.items():
        run = tmp_path / layout
        train(config_file, [*common, *sizes, f"train.output_dir={run}"])
        assert quarantined(run) == quarantined(one), layout  # in the same order, too
        for got, want in zip(metrics(run), metrics(one), strict=True):
            assert {key: got[key] for key in COUNTS} == {key: want[key] for key in COUNTS}
            for key in want:
                if key.startswith("loss"):
                    assert got[key] == pytest.approx(want[key], rel=1e-5), f"{key} in {layout}"


def quarantined(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def test_run_ends_when_too_many_samples_cannot_be_used(config_file: Path, images: Path, tmp_path: Path) -> None:
    """A shard is truncated while the run reads it, on the first of two pipeline stages."""
    folder = tmp_path / "foreign"
    shutil.copytree(images, folder)
    options = [
        f"data.sources=[{{path: {folder}}}]",
        "train.steps=2000",
        "checkpoint.save_interval=1",
        "checkpoint.keep_last=1",
        "parallel.pipeline_model_parallel_size=2",
    ]
    launcher = start(config_file, options)
    wait_until(has_reached, launcher, tmp_path / "run", step=1)
    # Only the lead reads: the other stage has no data workers and decodes nothing.
    workers = {
        process.environ()["RANK"]: len(process.children()) for process in psutil.Process(launcher.pid).children()
    }
    assert workers == {"0": 1, "1": 0}
    os.truncate(folder / "images-000.tar", 1)
    output = finish(launcher)
    assert launcher.returncode != 0
    messages = re.findall(r"^error on rank (\d): (.*)$", output, re.MULTILINE)
    assert "0" in dict(messages)
    assert len({message for _, message in messages}) == 1
    found = re.fullmatch(
        r"(\d+) of the first \d+ samples could not be used \((.*)\), more than data.max_quarantined_fraction 0.01 "
        r"allows: fix the samples listed in .*/run/quarantine.jsonl, or raise data.max_quarantined_fraction",
        messages[0][1],
    )
    assert found, messages
    assert int(found[1]) > 10
    assert "unreadable_shard" in found[2]
    assert "training/loop.py" not in output  # no stack trace but the launcher's own
    records = quarantined(tmp_path / "run")
    assert len(records) == int(found[1])
    assert any("images-000.tar has 1 bytes and is not what was indexed" in record["detail"] for record in records)

    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("step_*")
    state = json.loads((checkpoint / "train_state.json").read_text())
    tally = state["data"]["tally"]
    assert sum(tally["reasons"].values()) == sum(record["step"] <= state["step"] for record in records)
    assert tally["samples"] == sum(line["samples"] for line in metrics(tmp_path / "run")[: state["step"]]) + sum(
        tally["reasons"].values()
    )
