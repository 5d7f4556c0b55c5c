"""Curation as a user runs it: shards and a recipe in, shards and a report out."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image, ImageOps
from typer.testing import CliRunner

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Filter, Filtered, SetFilter, judge_sample
from data_pipeline.curation.recipe import recipe_of
from data_pipeline.sharding.build import build_shards
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.catalogue import find_shards
from data_pipeline.shards.index import read_index
from data_pipeline.shards.reader import ShardReader
from tests.data_pipeline.curation.samples import PHOTOS, InMemory, file_of, photo
from tools.shard import app

KILL_ONCE = "CURATION_TEST_KILLED"  # environment variable with a file that exists after the kill


@dataclass
class Faulty(Filter):
    """A user's own filter with a mistake."""

    def __call__(self, sample: Candidate) -> Filtered | None:
        return sample.record["nothing"]


@dataclass
class KillOnce(Filter):
    """Kills its process the first time that it sees a certain sample."""

    at: str = ""

    def __call__(self, sample: Candidate) -> Filtered | None:
        marker = os.environ.get(KILL_ONCE)
        if marker and sample.name == self.at and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return None


WORDS = "the lamp in a harbour by sea and wind over grey stones near our old house where two boats lay"
RECIPE = """
filters:
  - near_duplicate_texts: {domains: [text, image_text], similarity: 0.7, words: 2}
  - caption_length: {min_characters: 12}
  - resolution: {min_side: 40}
  - solid_colour: {report_only: true}
  - albums
  - exact_duplicate_images
  - near_duplicate_images: {distance: 4}
  - repeated_text
  - concept_balance: {concepts: CONCEPTS, cap: 3, domains: [text]}
  - boxes
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of several shards with the same names: changed photographs, similar texts, and bad samples."""
    root = tmp_path_factory.mktemp("curation")
    (root / "concepts.txt").write_text("lamp\nsea\nharbour\n")
    rng = np.random.default_rng(1)
    words = WORDS.split()
    for number, source in enumerate(("first", "second")):
        given = root / f"{source}_in"
        given.mkdir()
        records: list[dict[str, Any]] = []
        for photo_number, name in enumerate(PHOTOS):
            image = photo(name, 96)
            versions = (image, image.resize((130, 110)), ImageOps.mirror(image)) if number else (image, image)
            for version, changed in enumerate(versions):
                file = f"{photo_number}-{version}.png"
                (given / file).write_bytes(file_of(changed))
                text = f"{name} in version {version} of {source}" if version or not number else "Short"
                records.append({"domain": "image_text", "text": text, "images": [file]})
        for file, image in (("red.png", Image.new("RGB", (64, 64), "red")), ("tiny.png", photo(PHOTOS[0], 30))):
            (given / file).write_bytes(file_of(image))
            records.append({"domain": "image_text", "text": f"An image, {file}, {source}", "images": [file]})
        for _ in range(40):
            text = " ".join(rng.permutation(words)[:12] if rng.random() < 0.5 else words[: rng.integers(8, 18)])
            records.append({"domain": "text", "text": text})
        for boxes in range(4):
            text = f"<image> {boxes} boxes" + " [[10,20,300,400]]" * boxes
            records.append({"domain": "grounding", "text": text, "images": [f"{boxes}-0.png"]})
        for words_in_text in (2, 60):
            text = "<image>" * 4 + " ".join(f"word{n}" for n in range(words_in_text))
            records.append({"domain": "interleaved", "text": text, "images": [f"{n}-0.png" for n in range(2, 6)]})
        order = rng.permutation(len(records))
        (given / "records.jsonl").write_text("".join(json.dumps(records[i]) + "\n" for i in order))
        build_shards([given / "records.jsonl"], root / source, shard_bytes=200_000)
        assert len(find_shards(str(root / source))) > 2
    return root


def run(*arguments: object, expect: int = 0) -> str:
    result = CliRunner().invoke(app, ["curate", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == expect, result.output
    return " ".join(result.output.split())


def recipe(folder: Path, out: Path, text: str = RECIPE) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(text.replace("CONCEPTS", str(folder / "concepts.txt")))
    return path


def all_samples(shards: list[Path], names: dict[Path, str]) -> list[Candidate]:
    reader, found = ShardReader(), []
    for shard in shards:
        index = read_index(shard)
        for row in range(index.table.num_rows):
            stored = index.sample(row)
            found.append(Candidate(f"{names[shard]}/{stored.key}", reader.read(str(shard), stored)))
    return found


def apply_in_order(
    samples: list[Candidate], steps: list[tuple[str, Filter | SetFilter]]
) -> tuple[list[Candidate], list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Apply each filter to the whole set that the one above it kept: the definition of a recipe.

    Returns:
        The kept samples, and (sample, filter, reason) of filtered and of reported ones.
    """
    removed: list[tuple[str, str, str]] = []
    reported: list[tuple[str, str, str]] = []
    for name, step in steps:
        if isinstance(step, Filter):
            answers = ((row, judge_sample(step, sample)) for row, sample in enumerate(samples))
            verdicts = {row: verdict for row, verdict in answers if verdict}
        else:
            judged = [row for row, sample in enumerate(samples) if step.judges(sample)]
            found = dict(step.decide(InMemory(step, [samples[row] for row in judged])))
            verdicts = {judged[index]: verdict for index, verdict in sorted(found.items())}
        lines = [(samples[row].name, name, verdict.reason) for row, verdict in verdicts.items()]
        if step.report_only:
            reported += lines
        else:
            removed += lines
            samples = [sample for row, sample in enumerate(samples) if row not in verdicts]
    return samples, removed, reported


def listed(path: Path) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["detail"] for line in lines)
    return [(f"{line['shard']}/{line['key']}", line["filter"], line["reason"]) for line in lines]


def stored_in(out: Path) -> list[dict[str, Any]]:
    return list(wds.WebDataset([str(shard) for shard in find_shards(str(out))], shardshuffle=False))


def result_files(out: Path) -> dict[str, bytes]:
    assert not list(out.glob("*.tmp"))
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def curated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("out") / "curated"
    shown = run(folder / "first", folder / "second", "--out", out, "--recipe", recipe(folder, out), "--workers", 1)
    return out, shown


def test_the_kept_samples_are_those_of_applying_filters_in_order(folder: Path, curated: tuple[Path, str]) -> None:
    out, shown = curated
    shards = [*find_shards(str(folder / "first")), *find_shards(str(folder / "second"))]
    samples = all_samples(shards, {shard: f"{shard.parent.name}/{shard.name}" for shard in shards})
    steps = recipe_of((out / "recipe.yaml").read_text()).filters
    kept, removed, reported = apply_in_order(samples, steps)
    assert len({name for _, name, _ in removed}) >= 7  # nearly every filter removes a sample
    assert listed(out / "filtered.jsonl") == removed
    assert listed(out / "reported.jsonl") == reported
    assert reported

    stored = stored_in(out)
    assert len(stored) == len(kept)
    for sample, read_back in zip(kept, stored, strict=True):
        assert json.loads(read_back["json"]) == sample.record
        assert [data for name, data in read_back.items() if name.endswith(".png")] == sample.images

    funnel = json.loads((out / "funnel.json").read_text())
    assert sum(funnel["read"].values()) == len(samples)
    assert sum(funnel["kept"].values()) == len(kept)
    counts = [step["samples"] for step in funnel["steps"] if not step["report_only"]]
    assert sum(counts) == len(removed)
    for step in funnel["steps"][1:]:
        assert f"{step['filter']}{' (only reports)' if step['report_only'] else ''} │ {step['samples']} │" in shown
    with Image.open(out / "funnel.png") as chart:
        assert chart.width > 500


def test_two_processes_give_the_files_of_one(folder: Path, curated: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "curated"
    run(folder / "first", folder / "second", "--out", out, "--recipe", recipe(folder, out), "--workers", 2)
    assert result_files(out) == result_files(curated[0])


def test_members_of_an_array_give_the_files_of_one_process(
    folder: Path, curated: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in any order. The last one decides and writes."""
    out = tmp_path / "curated"
    arguments = [folder / "first", folder / "second", "--out", out, "--recipe", recipe(folder, out), "--array"]
    shards = len(find_shards(str(folder / "first"))) + len(find_shards(str(folder / "second")))
    for name, value in (("MIN", 5), ("MAX", 7), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    shown = []
    for member in (7, 5, 6, 5):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(member))
        shown.append(run(*arguments, "--executor", "here"))
    examined = [len(range(2, shards, 3)), len(range(2, shards, 3)) + len(range(0, shards, 3))]
    assert [line.split(":")[0] for line in shown[:2]] == [
        f"{count} of {shards} shards are examined" for count in examined
    ]
    assert shown[2:] == [curated[1].replace(str(curated[0]), str(out))] * 2
    assert result_files(out) == result_files(curated[0])


def test_of_parts_that_end_at_the_same_time_one_decides_and_writes(
    folder: Path, curated: tuple[Path, str], tmp_path: Path
) -> None:
    """Four parts find all shards examined at the same time. A late one may find everything written."""
    out, count = tmp_path / "curated", 4
    shutil.copytree(curated[0] / ".curation", out / ".curation", ignore=shutil.ignore_patterns("writer"))
    arguments = [folder / "first", folder / "second", "--out", out, "--recipe", recipe(folder, out)]
    fork = multiprocessing.get_context("fork")
    barrier, outputs = fork.Barrier(count), fork.Queue()

    def member(number: int) -> None:
        barrier.wait()
        outputs.put(run(*arguments, "--executor", "here", "--part", f"{number}/{count}"))

    members = [fork.Process(target=member, args=(number,)) for number in range(count)]
    for process in members:
        process.start()
    shown = [outputs.get(timeout=60) for _ in members]
    for process in members:
        process.join()
    writer = (out / ".curation" / "writer").read_text()
    waiting = [line for line in shown if "shards are examined" in line]
    assert len(waiting) < count
    assert all(f"part {writer} " in line for line in waiting)
    assert result_files(out) == result_files(curated[0])


CAPTIONER = """
import json, os, signal, sys
from pathlib import Path
for line in sys.stdin:
    key = json.loads(line)["key"]
    print(key, file=open({log!r}, "a"))
    if key == {at!r} and not Path({marker!r}).exists():
        Path({marker!r}).touch()
        os.kill(os.getppid(), signal.SIGKILL)
    print(json.dumps(dict(text="About " + key)), flush=True)
"""


@pytest.mark.parametrize("parts", [1, 2])
def test_a_curation_resumes_after_a_kill_in_either_pass(folder: Path, tmp_path: Path, parts: int) -> None:
    """Alone, or as one of two parts. The other part neither decides nor writes for it."""
    shards = find_shards(str(folder / "second"))
    samples = all_samples(shards, {shard: shard.name for shard in shards})
    image_samples = [sample.name for sample in samples if sample.domain == "image_text"]
    killing_sample = samples[len(samples) * 2 // 3].name
    log, marks = tmp_path / "log.txt", (tmp_path / "pass-1", tmp_path / "pass-3")
    captioner = tmp_path / "captioner.py"
    captioner.write_text(
        CAPTIONER.format(log=str(log), at=image_samples[len(image_samples) // 2], marker=str(marks[1]))
    )
    given = f"""
filters:
  - {KillOnce.__module__}:KillOnce: {{at: {killing_sample}}}
recaption: {{command: {sys.executable} {captioner}, concurrency: 1}}
"""
    out = tmp_path / "curated"
    whole = [folder / "second", "--out", out, "--recipe", recipe(folder, out, given), "--executor", "here"]
    killed_part = [shard.name for shard in shards].index(killing_sample.split("/")[0]) % parts
    arguments, *others = [[*whole, "--part", f"{(killed_part + n) % parts}/{parts}"] for n in range(parts)]
    command = [sys.executable, "-m", "tools.shard", "curate", *map(str, arguments)]
    messages = ("shards are examined", f"part {killed_part}/2 ")  # pass 1 is not finished; only this part may write
    for marker, message in zip(marks, messages, strict=True):
        killed = subprocess.run(command, env={**os.environ, KILL_ONCE: str(marks[0])}, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert marker.exists()
        for other in others:
            assert message in run(*other)
        assert not (out / "manifest.json").exists()
    first_pass = {path: path.stat().st_mtime_ns for path in (out / ".curation").glob("*.arrow")}
    assert len(first_pass) == len(shards)
    shown = run(*arguments)
    assert f"recaptioned │ {len(image_samples)}" in shown
    assert {path: path.stat().st_mtime_ns for path in first_pass} == first_pass

    asked = log.read_text().split()
    assert sorted(asked) == sorted(
        [*image_samples, image_samples[len(image_samples) // 2]]
    )  # only this sample was asked twice
    stored = {
        json.loads(sample["json"])["text"]
        for sample in wds.WebDataset(str(find_shards(str(out))[0]), shardshuffle=False)
    }
    assert {f"About {name}" for name in image_samples} <= stored

    assert (out / "recaption_failed.jsonl").read_text() == ""

    uninterrupted = tmp_path / "uninterrupted"
    run(folder / "second", "--out", uninterrupted, "--recipe", recipe(folder, uninterrupted, given), "--workers", 1)
    assert result_files(uninterrupted) == result_files(out)
    assert "recaptioned" in run(*arguments)  # running it again changes nothing
    assert result_files(uninterrupted) == result_files(out)


def test_a_damaged_sample_is_filtered_and_counted(folder: Path, tmp_path: Path) -> None:
    source = find_shards(str(folder / "first"))[0]
    index = read_index(source)
    row = next(row for row in range(index.table.num_rows) if _is_inside(index.sample(row).members, source))
    damaged = tmp_path / "in"
    damaged.mkdir()
    data = bytearray(source.read_bytes())
    data[index.sample(row).members[-1].offset + 9] ^= 0xFF
    (damaged / source.name).write_bytes(data)
    (damaged / source.name).with_suffix(".index.arrow").write_bytes(source.with_suffix(".index.arrow").read_bytes())
    out = tmp_path / "curated"
    shown = run(damaged, "--out", out, "--recipe", recipe(folder, out, "filters: [aspect]"), "--workers", 1)
    assert "(reading) │ 1 │" in shown
    assert listed(out / "filtered.jsonl") == [(f"{source.name}/{index.sample(row).key}", "(reading)", "checksum")]


def test_samples_that_the_build_rejects_are_counted(tmp_path: Path) -> None:
    """A truncated image with a valid header: this recipe decodes nothing, but the build does."""
    (tmp_path / "in").mkdir()
    with wds.TarWriter(str(tmp_path / "in" / "foreign.tar")) as writer:
        files = [file_of(photo(name, 60), "JPEG") for name in PHOTOS[:2]]
        for key, data in (("0", files[0]), ("1", files[1][:-500])):
            writer.write({"__key__": key, "json": {"domain": "ocr", "text": "Words."}, "0.jpg": data})
    index_shards([tmp_path / "in" / "foreign.tar"])
    out = tmp_path / "curated"
    (tmp_path / "recipe.yaml").write_text("filters: [aspect]")
    shown = run(tmp_path / "in", "--out", out, "--recipe", tmp_path / "recipe.yaml", "--workers", 1)
    assert "(writing) │ 1 │ │ 1 unreadable_image │ │ kept │ 1 │ 1 │" in shown
    assert json.loads((out / "rejected.jsonl").read_text())["origin"] == "foreign.tar/1"


def _is_inside(members: list[Any], tar: Path) -> bool:
    """Whether a sample lies between both ends of the tar, which have a checksum of their own."""
    return members[-1].offset > 1 << 16 and members[-1].offset + 10 < tar.stat().st_size - (1 << 16)


def test_errors_of_a_curation_are_one_line(
    folder: Path, curated: tuple[Path, str], tmp_path: Path, tokenizer_folder: Path
) -> None:
    out = curated[0]
    first, second = folder / "first", folder / "second"
    changed = recipe(folder, tmp_path / "changed", RECIPE.replace("cap: 3", "cap: 4"))
    assert "begun with another recipe" in run(first, second, "--out", out, "--recipe", changed, expect=2)
    same = out.with_suffix(".yaml")
    assert "begun with another set of shards" in run(first, "--out", out, "--recipe", same, expect=2)
    assert "the first number is 0 to 1" in run(first, "--out", out, "--recipe", same, "--part", "2/2", expect=2)
    part = [first, "--out", tmp_path / "parts", "--executor", "here", "--part"]
    assert "shards are examined" in run(*part, "0/2", "--recipe", same)
    assert "begun with another recipe" in run(*part, "1/2", "--recipe", changed, expect=2)
    other = ["--recipe", same, "--tokenizer", tokenizer_folder]
    assert "begun with another tokenizer" in run(*part, "1/2", *other, expect=2)
    empty = tmp_path / "empty"
    nothing = recipe(folder, empty, "filters: [{caption_length: {min_characters: 9999, domains: []}}]")
    assert "no sample is kept" in run(first, "--out", empty, "--recipe", nothing, "--workers", 1, expect=2)
    faulty = recipe(folder, tmp_path / "faulty", f"filters: ['{Faulty.__module__}:Faulty']")
    shown = run(first, "--out", tmp_path / "faulty", "--recipe", faulty, "--workers", 1, expect=2)
    assert f"error: filter {Faulty.__module__}:Faulty, shard-00000-00000.tar/00000-000000 to " in shown
    assert shown.endswith("KeyError: 'nothing'")
    assert "no index" in run(*_without_index(folder, tmp_path), "--out", tmp_path / "x", "--recipe", changed, expect=2)


def _without_index(folder: Path, tmp_path: Path) -> list[Path]:
    source = find_shards(str(folder / "first"))[0]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / source.name).write_bytes(source.read_bytes())
    return [tmp_path / "bare"]
