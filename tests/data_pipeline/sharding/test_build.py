"""Builds: the same bytes with any number of workers and after any kill, and every record accounted for."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import webdataset as wds

from data_pipeline.encoding.encode import encode_record
from data_pipeline.errors import DataError
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sharding.build import build_shards, plan, read_manifest, run_build
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.sharding.job_slice import JobSlice
from data_pipeline.sharding.tasks import BuildOptions
from data_pipeline.sharding.writing import WORK
from data_pipeline.shards.catalogue import read_catalogue
from data_pipeline.shards.index import read_index
from tests.data_pipeline.media_files import encoded, pattern
from tests.data_pipeline.sharding.builds import FILES, RECORDS, built, contents

# --- what is written --------------------------------------------------------------------------------------------------


def test_build_holds_every_record_or_the_reason_why_not(records, uninterrupted, tmp_path):
    for name, data in uninterrupted.items():
        (tmp_path / name).write_bytes(data)
    manifest = json.loads(uninterrupted["manifest.json"])
    good = {"image_text": FILES * (RECORDS - 4), "text": FILES, "video": FILES}
    assert manifest["domains"] == good
    assert manifest["rejected"] == {"outside_folder": FILES, "unreadable_image": FILES}
    assert manifest["unused_fields"] == {"license": good["image_text"]}
    assert manifest["samples"] == sum(good.values())

    # webdataset reads the given files in order, each record with its origin.
    tars = [str(tmp_path / shard["file"]) for shard in manifest["shards"]]
    stored = list(wds.WebDataset(tars, shardshuffle=False))
    assert len({sample["__key__"] for sample in stored}) == len(stored) == manifest["samples"]
    lines = [line for file in sorted(records.glob("*.jsonl")) for line in file.read_text().splitlines()]
    given = [json.loads(line) for line in lines]
    wanted = [record for record in given if record["text"] not in ("cut", "not mine")]
    for sample, record in zip(stored, wanted, strict=True):
        found = json.loads(sample["json"])
        file, line = found.pop("source").split(":")
        assert json.loads((records / file).read_text().splitlines()[int(line) - 1]) == record
        assert found == {key: value for key, value in record.items() if key not in ("images", "videos")}
        for field, suffix in (("images", "0.jpg"), ("videos", "0.mp4")):
            for name in record.get(field, []):
                assert sample[suffix] == (records / name).read_bytes()

    rejected = [json.loads(line) for line in uninterrupted["rejected.jsonl"].splitlines()]
    assert [entry["origin"] for entry in rejected] == [
        f"{file}.jsonl:{line}" for file in range(FILES) for line in (RECORDS - 1, RECORDS)
    ]
    # An index made while writing is the index that a scan of the tar makes.
    for shard in manifest["shards"]:
        tar = tmp_path / shard["file"]
        written = read_index(tar)
        tar.with_suffix(".index.arrow").unlink()
        index_shards([tar])
        assert read_index(tar).table.equals(written.table)
        assert read_index(tar).header == written.header
    shards, rows = read_catalogue(tmp_path / "catalogue.arrow", "")
    assert (len(shards), rows.num_rows) == (len(manifest["shards"]), manifest["samples"])


def test_manifest_of_an_earlier_version_is_read(uninterrupted, tmp_path):
    manifest = json.loads(uninterrupted["manifest.json"])
    del manifest["not_read"], manifest["items"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path) == manifest


def test_source_field_does_not_change_the_encoded_sample(tokenizer):
    record = {"domain": "text", "text": "Words."}
    plain, known = (
        encode_record(given, [], [], tokenizer=tokenizer, budget=PixelBudget())
        for given in (record, {**record, "source": "a.jsonl:1", "given_source": "a book"})
    )
    assert (plain.input_ids == known.input_ids).all()
    assert (plain.loss == known.loss).all()


def test_own_source_field_is_kept_as_given_source(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"domain": "text", "text": "x", "source": "a book"}) + "\n")
    build_shards([tmp_path / "a.jsonl"], tmp_path / "out")
    [sample] = wds.WebDataset(str(tmp_path / "out" / "shard-00000-00000.tar"), shardshuffle=False)
    assert json.loads(sample["json"]) == {
        "domain": "text",
        "text": "x",
        "given_source": "a book",
        "source": "a.jsonl:1",
    }


def test_nan_and_infinity_become_null(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"domain": "text", "text": "NaN it is", "scores": [NaN, 1e999, -Infinity, 0.5]}\n'
    )
    build_shards([tmp_path / "a.jsonl"], tmp_path / "out")
    [sample] = wds.WebDataset(str(tmp_path / "out" / "shard-00000-00000.tar"), shardshuffle=False)
    stored = json.loads(sample["json"], parse_constant=pytest.fail)
    assert stored == {"domain": "text", "text": "NaN it is", "scores": [None, None, None, 0.5], "source": "a.jsonl:1"}


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_two_processes_write_the_same_bytes_as_one(records, uninterrupted, tmp_path):
    built(records, tmp_path, executor="processes", workers=2)
    assert contents(tmp_path) == uninterrupted


def test_job_slices_write_the_same_bytes_as_one_build(records, uninterrupted, tmp_path):
    """Jobs of a SLURM array run in any order; the last one writes the manifest."""
    inputs = open_inputs([str(path) for path in sorted(records.glob("*.jsonl"))])
    planned = plan(inputs, BuildOptions(str(tmp_path), shard_bytes=60_000))
    finished = [run_build(planned, job_slice=JobSlice(index, 3)).finished for index in (1, 2, 0)]
    assert finished == [False, False, True]
    assert contents(tmp_path) == uninterrupted
    assert run_build(planned, job_slice=JobSlice(1, 3)).was_finished
    assert contents(tmp_path) == uninterrupted


def test_build_killed_ten_times_gives_the_same_bytes(records, uninterrupted, tmp_path, forked):
    """Send SIGKILL to the whole process group of a build on two processes.

    Each kill comes at a random moment after none, one or two more tasks are done.
    """
    moments = random.Random(7)
    work = tmp_path / "out" / WORK
    left: Counter[str] = Counter()
    while left["kills"] < 10:
        goal = len(list(work.glob("task-*.json"))) + moments.choice([0, 0, 1, 2])
        pid = os.fork()
        if pid == 0:
            os.setsid()
            try:
                built(records, tmp_path / "out", executor="processes", workers=2)
            finally:
                os._exit(0)
        while os.getpgid(pid) != pid:  # not yet
            time.sleep(0.001)
        patience = time.monotonic() + 5
        while len(list(work.glob("task-*.json"))) < goal and time.monotonic() < patience:
            if (tmp_path / "out" / "manifest.json").exists():
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            left["kills"] += 1
            left["begun"] += any(path.is_dir() for path in work.glob("task-*"))
            left["done"] += any(work.glob("task-*.json"))
        else:  # it finished before the kill: start again
            assert contents(tmp_path / "out") == uninterrupted
            shutil.rmtree(tmp_path / "out")
    assert left["begun"]
    assert left["done"]
    built(records, tmp_path / "out")
    assert contents(tmp_path / "out") == uninterrupted
    assert built(records, tmp_path / "out").was_finished


@pytest.mark.parametrize(("option", "file"), [("fonts", "DejaVuSans.ttf"), ("backgrounds", "a.jpg")])
def test_changed_fonts_or_backgrounds_are_another_build(tmp_path, option, file):
    (tmp_path / "a.txt").write_text("Words.\n")
    material = tmp_path / "material"
    material.mkdir()
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    shutil.copy(fonts / "DejaVuSans.ttf", material)
    (material / "a.jpg").write_bytes(encoded(pattern(300, 400)))
    settings = sorted({f"fonts={material}", f"{option}={material}"})
    how: dict[str, Any] = {"kind": "rendered_text", "settings": settings}
    build_shards([tmp_path / "a.txt"], tmp_path / "out", **how)
    assert build_shards([tmp_path / "a.txt"], tmp_path / "out", **how).was_finished
    (material / file).write_bytes((material / file).read_bytes() + b"?")
    with pytest.raises(DataError, match=f"holds another build: inputs material .*{option} was"):
        build_shards([tmp_path / "a.txt"], tmp_path / "out", **how)
