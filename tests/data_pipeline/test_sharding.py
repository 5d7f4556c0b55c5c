"""Builds: the same bytes whoever makes them and however often they are killed, and nothing lost on the way."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import pytest
import ray
import webdataset as wds

from data_pipeline.encoding.encode import encode_record
from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Unit
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sharding import executors, writing
from data_pipeline.sharding.build import Outcome, Part, build_shards, plan, run_build
from data_pipeline.sharding.crashes import READING, Deaths, Place
from data_pipeline.sharding.executors import run_processes, run_ray
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.sharding.tasks import BuildOptions, Task
from data_pipeline.sharding.writing import WORK
from data_pipeline.shards.catalogue import read_catalogue
from data_pipeline.shards.index import read_index, write_index
from tests.data_pipeline.crashing import Crashing, Spared, crash_at
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

FILES, RECORDS = 10, 12


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten files of a dozen records each, pictures, text, clips, and a few that cannot be used."""
    folder = tmp_path_factory.mktemp("records")
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(encoded(pattern(120 + 8 * number, 160, number)))
    (folder / "clip.mp4").write_bytes(encoded_video(6))
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


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked from here, so that they start at once."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(executors.multiprocessing, "get_context", lambda method: context)


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


def test_what_json_cannot_say_becomes_null(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"domain": "text", "text": "NaN it is", "scores": [NaN, 1e999, -Infinity, 0.5]}\n'
    )
    build_shards([tmp_path / "a.jsonl"], tmp_path / "out")
    [sample] = wds.WebDataset(str(tmp_path / "out" / "shard-00000-00000.tar"), shardshuffle=False)
    stored = json.loads(sample["json"], parse_constant=pytest.fail)
    assert stored == {"domain": "text", "text": "NaN it is", "scores": [None, None, None, 0.5], "source": "a.jsonl:1"}


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


def test_killed_at_ten_moments(records, undisturbed, tmp_path, forked):
    """SIGKILL to the whole process group of a build on two processes, forked from here so that they start at once: a
    random moment after none, one or two more of its tasks are done."""
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
        else:  # it was done first: once more from the beginning
            assert contents(tmp_path / "out") == undisturbed
            shutil.rmtree(tmp_path / "out")
    assert left["begun"]
    assert left["done"]
    built(records, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed
    assert built(records, tmp_path / "out").was_finished


@pytest.mark.parametrize(("option", "file"), [("fonts", "DejaVuSans.ttf"), ("backgrounds", "a.jpg")])
def test_changed_fonts_and_backgrounds_make_another_build(tmp_path, option, file):
    (tmp_path / "a.txt").write_text("Words.\n")
    material = tmp_path / "material"
    material.mkdir()
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    shutil.copy(fonts / "DejaVuSans.ttf", material)
    (material / "a.jpg").write_bytes(encoded(pattern(300, 400)))
    how: dict[str, Any] = {"kind": "rendered_text", "settings": [f"fonts={material}", f"{option}={material}"]}
    build_shards([tmp_path / "a.txt"], tmp_path / "out", **how)
    assert build_shards([tmp_path / "a.txt"], tmp_path / "out", **how).was_finished
    (material / file).write_bytes((material / file).read_bytes() + b"?")
    with pytest.raises(DataError, match=f"holds a build of something else: inputs material .*{option} was"):
        build_shards([tmp_path / "a.txt"], tmp_path / "out", **how)


# --- workers that die -------------------------------------------------------------------------------------------------


def build_of(given: Crashing, out: Path, **how) -> Outcome:
    return run_build(plan([("crashing", given)], BuildOptions(str(out), shard_bytes=2000)), **how)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith((".tar", ".arrow"))}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_crashes_its_reader_is_set_aside_and_nothing_else(tmp_path, forked, caplog, workers):
    """Real segmentation faults in reading and in decoding, a worker that is killed once, one that always is."""
    given: dict[str, Any] = {"crashes": (1, 6), "deadly": ((3, 1), (3, 2), (9, 0))}
    given |= {"killed": (10,), "killed_once": (4, 11), "folder": str(tmp_path)}
    outcome = build_of(Crashing(**given), tmp_path / "out", executor="processes", workers=workers)
    assert outcome.counts.rejected == {"crashed_reader": 6}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["origin"], line["detail"].split("(")[1].split(")")[0]) for line in rejected] == [
        ("unit-1", "SIGSEGV"),
        ("unit-3:1", "SIGSEGV"),
        ("unit-3:2", "SIGSEGV"),
        ("unit-6", "SIGSEGV"),
        ("unit-9:0", "SIGSEGV"),
        ("unit-10", "SIGKILL"),
    ]
    build_of(Spared(**given), tmp_path / "spared")
    assert outcome.tasks > 3
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "spared")
    said = [record.getMessage() for record in caplog.records]
    assert sum("tried once more" in line for line in said) == 8
    assert "task 0, unit-1: a worker died (SIGSEGV); the task is tried once more" in said
    assert "task 1, unit-3, sample 1 of it: a worker died again (SIGSEGV); it is set aside as crashed_reader" in said


def test_workers_that_die_at_no_unit_end_the_build_when_the_rest_is_done(tmp_path, forked, monkeypatch):
    """A bug while shards are closed is nobody's file."""
    monkeypatch.setattr(writing, "write_index", _die_at_the_third_task)
    with pytest.raises(DataError, match=r"^task 2, at no unit: workers died twice \(SIGSEGV\)\. SIGKILL mostly"):
        build_of(Crashing(), tmp_path / "out", executor="processes", workers=2)
    done = sorted(path.name for path in (tmp_path / "out" / WORK).glob("task-*.json"))
    assert len(done) > 2
    assert "task-00002.json" not in done
    monkeypatch.undo()
    build_of(Crashing(), tmp_path / "out")
    build_of(Crashing(), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _die_at_the_third_task(tar: Path, *rest, **how) -> None:
    crash_at("bad.tar" if "-00002-" in tar.name else tar.name)
    write_index(tar, *rest, **how)


def test_a_worker_that_dies_is_told_with_what_it_was_on(forked):
    with pytest.raises(DataError, match=r"a worker process died \(SIGSEGV\) while it was on bad\.tar\. .*fewer --work"):
        list(run_processes(crash_at, ["a.tar", "bad.tar", "b.tar"], workers=2))


def test_what_a_task_raises_ends_all_workers(forked):
    """An EOFError too, by which the end of a worker is known."""
    before = set(multiprocessing.active_children())
    with pytest.raises(EOFError, match="of the task") as raised:
        list(run_processes(_end_of_file, [1, 2, 3], workers=2))
    assert "_end_of_file" in "".join(raised.value.__notes__)
    assert set(multiprocessing.active_children()) == before


def _end_of_file(task: int) -> None:
    raise EOFError("of the task")


@pytest.mark.fast
def test_the_rule_by_which_deaths_are_judged():
    task = Task(7, ((0, Unit("a.pdf", 0, 9)), (0, Unit("a.pdf", 9, 18))), 0)
    cases: list[tuple[list[Place | None], Place | None]] = [
        ([Place(0, READING)], None),
        ([Place(0, READING), Place(1, READING)], None),
        ([Place(0, READING), Place(1, READING), Place(0, READING)], Place(0, READING)),
        ([Place(0, 5), Place(0, 5)], Place(0, 5)),
        ([Place(0, 5), Place(0, 6)], Place(0, READING)),
        ([Place(0, 5), Place(0, READING)], Place(0, READING)),
        ([Place(0, 5), Place(0, 5), Place(0, 6)], None),
        ([Place(0, 5), Place(0, 5), Place(0, 6), Place(0, 6)], Place(0, 6)),
        ([None, Place(0, 0)], None),
    ]
    for places, wanted in cases:
        deaths = Deaths()
        crash = [deaths.blame(task, place, "SIGSEGV") for place in places][-1]
        assert (crash and crash.place) == wanted
        assert not deaths.given_up
    assert [deaths.blame(task, None, "SIGSEGV") for _ in range(2)] == [None, None]
    assert deaths.given_up == {7: "task 7, at no unit: workers died twice (SIGSEGV)"}


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where Ray keeps its sessions; short, as sockets lie in it. Nothing of Ray is left when the tests are done."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield folder
    left = [
        process for process in psutil.process_iter(["cmdline"]) if folder in " ".join(process.info["cmdline"] or [])
    ]
    _, alive = psutil.wait_procs(left, timeout=30)
    shutil.rmtree(folder)
    assert not alive


@pytest.fixture(scope="module")
def ray_cluster(ray_folder: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", ray_folder)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


def test_ray_writes_the_same_though_its_workers_are_killed(records, undisturbed, tmp_path, ray_cluster):
    """And what a task raises there is raised here."""
    killed: list[int] = []
    ended = threading.Event()
    killer = threading.Thread(target=_kill_ray_workers, args=(killed, ended, tmp_path / WORK))
    killer.start()
    try:
        built(records, tmp_path, executor="ray", workers=2)
        with pytest.raises(DataError, match="the mend"):
            list(run_ray(_mistake, [1], workers=2))
    finally:
        ended.set()
        killer.join()
    assert killed
    assert contents(tmp_path) == undisturbed


def _mistake(task: int) -> None:
    raise DataError("the mend")


def _kill_ray_workers(killed: list[int], ended: threading.Event, work: Path) -> None:
    """SIGKILL to three processes that are doing a task, each after another task is done. Their tasks are done again."""
    moments = random.Random(3)
    while len(killed) < 3 and not ended.wait(moments.uniform(0.01, 0.1)):
        if len(list(work.glob("task-*.json"))) < len(killed):
            continue
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::_on_one_core"] and process.pid not in killed:
                    process.kill()
                    killed.append(process.pid)
                    break
            except psutil.NoSuchProcess:
                continue


def kill_rays(records: Path, out: Path, times: int, ahead: Sequence[int], ray_folder: str) -> Counter[str]:
    """SIGKILL to builds on a Ray of their own, and to all of that Ray: driver, servers and workers, at random moments
    after so many more tasks are done, drawn from `ahead`. Says what was left."""
    moments = random.Random(7)
    left: Counter[str] = Counter()
    program = f"from tests.data_pipeline.crashing import ray_build; ray_build({str(records)!r}, {str(out)!r})"
    work = out / WORK
    while left["kills"] < times:
        goal = len(list(work.glob("task-*.json"))) + moments.choice(ahead)
        driver = psutil.Popen(
            [sys.executable, "-c", program],
            start_new_session=True,
            env={**os.environ, "RAY_TMPDIR": ray_folder},
        )
        while driver.poll() is None and not (work.is_dir() and len(list(work.glob("task-*.json"))) >= goal):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        if driver.poll() is None:
            family = [*driver.children(recursive=True), driver]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            _, alive = psutil.wait_procs(family, timeout=30)
            assert not alive
            left["kills"] += 1
            left["begun"] += any(path.is_dir() for path in work.glob("task-*"))
            left["done"] += any(work.glob("task-*.json"))
        else:  # it was done first: once more from the beginning
            assert driver.returncode == 0
            shutil.rmtree(out)
    return left


def test_ray_goes_on_where_it_was_killed(records, undisturbed, tmp_path, ray_folder, ray_cluster):
    out = tmp_path / "out"
    assert kill_rays(records, out, 1, [1], ray_folder)["done"]
    built(records, out, executor="ray", workers=2)
    assert contents(out) == undisturbed


@pytest.mark.slow
def test_ray_killed_at_ten_moments(records, undisturbed, tmp_path, ray_folder, ray_cluster):
    out = tmp_path / "out"
    left = kill_rays(records, out, 10, [0, 1, 1, 2], ray_folder)
    assert left["begun"]
    assert left["done"]
    built(records, out, executor="ray", workers=2)
    assert contents(out) == undisturbed


def test_ray_sets_the_same_aside(tmp_path, ray_cluster):
    given: dict[str, Any] = {"crashes": (6,), "deadly": ((3, 1),)}
    outcome = build_of(Crashing(**given), tmp_path / "out", executor="ray", workers=2)
    assert outcome.counts.rejected == {"crashed_reader": 2}
    build_of(Spared(**given), tmp_path / "spared")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "spared")
