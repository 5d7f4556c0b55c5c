"""Builds: the same bytes whoever makes them and however often they are killed, and nothing lost on the way."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import ray
import webdataset as wds

from data_pipeline.catalogue import read_catalogue
from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.errors import DataError
from data_pipeline.index import read_index
from data_pipeline.inputs import open_inputs
from data_pipeline.sharding import executors
from data_pipeline.sharding.build import Outcome, Part, build_shards, plan, run_build
from data_pipeline.sharding.executors import run_ray
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.sharding.tasks import BuildOptions
from data_pipeline.sharding.writing import WORK
from tests.data_pipeline.media import clip, encoded, pattern

FILES, RECORDS = 10, 12


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten files of a dozen records each, pictures, text, clips, and a few that cannot be used."""
    folder = tmp_path_factory.mktemp("records")
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(encoded(pattern(120 + 8 * number, 160, number)))
    (folder / "clip.mp4").write_bytes(clip(6))
    (folder / "cut.jpg").write_bytes(encoded(pattern(60, 90))[:-300])
    for file in range(FILES):
        lines = [
            {"domain": "image_text", "text": f"Picture {n} of {file}.", "images": [f"{n % 6}.jpg"], "license": "own"}
            for n in range(RECORDS - 4)
        ]
        lines.append({"domain": "text", "text": "Words, many words. " * 20})
        lines.append({"domain": "video", "text": "A clip.", "videos": ["clip.mp4"]})
        lines.append({"domain": "image_text", "text": "cut", "images": ["cut.jpg"]})
        lines.append({"domain": "image_text", "text": "not mine", "images": ["../../etc/passwd"]})
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def built(records: Path, out: Path, **how) -> Outcome:
    return build_shards(sorted(records.glob("*.jsonl")), out, shard_bytes=60_000, **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert built(records, out).tasks > FILES // 2
    return contents(out)


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_build_holds_every_record_or_the_reason_why_not(records, undisturbed, tmp_path):
    for name, data in undisturbed.items():
        (tmp_path / name).write_bytes(data)
    manifest = json.loads(undisturbed["manifest.json"])
    good = {"image_text": FILES * (RECORDS - 4), "text": FILES, "video": FILES}
    assert manifest["domains"] == good
    assert manifest["rejected"] == {"outside_folder": FILES, "unreadable_image": FILES}
    assert manifest["unused_fields"] == {"license": good["image_text"]}
    assert manifest["samples"] == sum(good.values())

    # webdataset reads what was given, in order, each record with where it came from.
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

    rejected = [json.loads(line) for line in undisturbed["rejected.jsonl"].splitlines()]
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


def test_where_a_record_comes_from_changes_nothing_in_training(tokenizer):
    record = {"domain": "text", "text": "Words."}
    plain, known = (
        encode_record(given, [], [], tokenizer=tokenizer, budget=PixelBudget())
        for given in (record, {**record, "source": "a.jsonl:1", "given_source": "a book"})
    )
    assert (plain.input_ids == known.input_ids).all()
    assert (plain.loss == known.loss).all()


def test_a_record_keeps_its_own_source_under_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"domain": "text", "text": "x", "source": "a book"}) + "\n")
    build_shards([tmp_path / "a.jsonl"], tmp_path / "out")
    [sample] = wds.WebDataset(str(tmp_path / "out" / "shard-00000-00000.tar"), shardshuffle=False)
    assert json.loads(sample["json"]) == {
        "domain": "text",
        "text": "x",
        "given_source": "a book",
        "source": "a.jsonl:1",
    }


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_two_processes_write_what_one_writes(records, undisturbed, tmp_path):
    built(records, tmp_path, executor="processes", workers=2)
    assert contents(tmp_path) == undisturbed


def test_parts_write_what_one_build_writes(records, undisturbed, tmp_path):
    """As members of a SLURM array do, in any order; the last one writes the manifest."""
    inputs = open_inputs([str(path) for path in sorted(records.glob("*.jsonl"))])
    planned = plan(inputs, BuildOptions(str(tmp_path), shard_bytes=60_000))
    finished = [run_build(planned, part=Part(index, 3)).finished for index in (1, 2, 0)]
    assert finished == [False, False, True]
    assert contents(tmp_path) == undisturbed
    assert run_build(planned, part=Part(1, 3)).was_finished
    assert contents(tmp_path) == undisturbed


def test_killed_at_ten_moments(records, undisturbed, tmp_path, monkeypatch):
    """SIGKILL to the whole process group of a build on two processes, forked from here so that they start at once: a
    random moment after none, one or two more of its tasks are done."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(executors.multiprocessing, "get_context", lambda method: context)
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
        else:  # it was done first: once more from the beginning
            assert contents(tmp_path / "out") == undisturbed
            shutil.rmtree(tmp_path / "out")
    assert left["begun"]
    assert left["done"]
    built(records, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed
    assert built(records, tmp_path / "out").was_finished


def test_ray_writes_the_same_though_its_workers_are_killed(records, undisturbed, tmp_path):
    """And what a task raises there is raised here."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    killed: list[int] = []
    done = threading.Event()
    killer = threading.Thread(target=_kill_ray_workers, args=(killed, done, random.Random(3)))
    killer.start()
    try:
        built(records, tmp_path, executor="ray", workers=2)
        with pytest.raises(DataError, match="the mend"):
            list(run_ray(_mistake, [1], workers=2))
    finally:
        done.set()
        killer.join()
        ray.shutdown()
    assert killed
    assert contents(tmp_path) == undisturbed


def _mistake(task: int) -> None:
    raise DataError("the mend")


def _kill_ray_workers(killed: list[int], done: threading.Event, moments: random.Random) -> None:
    """SIGKILL to three processes that are doing a task. Ray does their tasks again."""
    while len(killed) < 3 and not done.wait(moments.uniform(0.01, 0.1)):
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::_on_one_core"] and process.pid not in killed:
                    process.kill()
                    killed.append(process.pid)
                    break
            except psutil.NoSuchProcess:
                continue
