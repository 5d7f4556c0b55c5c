"""The sharding command on real files, as a user runs it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset as wds
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.loading.loader import PackedLoader
from data_pipeline.plan.pack_cost import PackCost
from data_pipeline.shards.index import read_index
from tests.data_pipeline.media_files import encoded, encoded_video, pattern
from tools.shard import app
from tools.shard_report import WIDEST
from tools.shard_stats import DomainStats, table_of

JPEG, PNG = encoded(pattern(60, 90), "JPEG"), encoded(pattern(90, 60, 1), "PNG")
GOOD: list[dict[str, Any]] = [
    {"domain": "image_text", "text": "A cat.", "images": ["a.jpg"]},
    {"domain": "interleaved", "text": "x <image> y <image>", "images": ["b.png", "a.jpg"]},
    {"domain": "video", "text": "A video.", "videos": ["c.mp4"]},
    {"domain": "text", "text": "Words."},
]
BAD: list[tuple[Any, str]] = [
    ({"domain": "interleaved", "text": "<image> <image>", "images": ["a.jpg"]}, "media_mismatch"),
    ({"domain": "image_text", "text": "x", "images": ["truncated.jpg"]}, "unreadable_image"),
    ({"domain": "image_text", "text": "x", "images": ["long.png"]}, "extreme_aspect"),
    ({"domain": "image_text", "text": "x", "images": ["gone.jpg"]}, "missing_file"),
    ({"domain": "image_text", "text": "x", "images": ["a.psd"]}, "unknown_extension"),
    ({"domain": "image_text", "text": "x", "images": ["../../etc/passwd"]}, "outside_folder"),
    ({"domain": "image_text", "text": "x", "images": ["https://example.org/a.jpg"]}, "remote_file"),
    ({"domain": "text", "text": "half of a pair: \ud83d"}, "bad_record"),
    ({"domain": "video", "text": "x", "videos": ["empty.mp4"]}, "video_without_frames"),
    ({"domain": "video", "text": "x", "videos": ["half.mp4"]}, "unreadable_video"),
    ({"domain": "image", "text": "x"}, "unknown_domain"),
    ({"domain": "text", "text": "x", "images": "a.jpg"}, "media_mismatch"),
    ("not JSON", "bad_record"),
]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    files = {"a.jpg": JPEG, "b.png": PNG, "truncated.jpg": JPEG[:-800], "long.png": encoded(pattern(5, 2000), "PNG")}
    files |= {"c.mp4": encoded_video(12), "empty.mp4": encoded_video(0), "half.mp4": encoded_video(30)[:1500]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "records.jsonl"


def write(records: Path, lines: list) -> None:
    records.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def run(*arguments: object, expect: int = 0) -> str:
    """Run a command in this process, unless an executor is named: starting processes takes longer than the work."""
    if arguments[0] != "stats" and "--executor" not in arguments:
        arguments += ("--executor", "here")
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == expect, result.output
    return " ".join(result.output.split())


def test_from_records_to_batches(records, tmp_path, tokenizer_folder):
    out = tmp_path / "shards"
    write(records, GOOD * 3)
    shown = run("build", "--input", records, "--out", out, "--tokenizer", tokenizer_folder, "--name", "mix")
    assert "shards: 1, samples: 12" in shown
    assert "rejected:" not in shown
    assert (out / "rejected.jsonl").read_text() == ""

    stored = list(wds.WebDataset(str(out / "mix-00000-00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in stored] == [f"00000-{number:06d}" for number in range(12)]
    assert (stored[1]["0.png"], stored[1]["1.jpg"]) == (PNG, JPEG)
    assert json.loads(stored[0]["json"]) == {"domain": "image_text", "text": "A cat.", "source": "records.jsonl:1"}

    assert "shards: 1, samples: 12" in run("verify", out, "--tokenizer", tokenizer_folder)
    assert "interleaved 3 6 0" in run("stats", out, "--plot", tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")

    config = DataConfig(tokenizer=str(tokenizer_folder), sources=[SourceConfig(str(out))], num_workers=0)
    loader = PackedLoader(
        config,
        seq_length=512,
        global_batch_size=1,
        cost=PackCost(token=1, token_squared=0),
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    [batch] = loader.next_step()
    assert batch.num_samples > 1
    assert not batch.quarantined


def test_bad_records_are_counted_and_listed(records, tmp_path, tokenizer_folder):
    write(records, [GOOD[0], *(record for record, _ in BAD), {**GOOD[3], "license": "own", "shelf": 7}])
    shown = run("build", "--input", records, "--out", tmp_path / "out", "--tokenizer", tokenizer_folder)
    assert "bad_record │ 2" in shown
    assert "fields that are stored but not used: 'license' (1), 'shelf' (1)" in shown
    assert f"samples: 2, rejected: {len(BAD)}, see {tmp_path}/out/rejected.jsonl" in shown
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["origin"], entry["reason"]) for entry in listed] == [
        (f"records.jsonl:{number}", reason) for number, (_, reason) in enumerate(BAD, start=2)
    ]
    assert all(entry["detail"] for entry in listed)
    assert read_index(tmp_path / "out" / "out-00000-00000.tar").table.num_rows == 2


def test_foreign_shards_are_indexed_and_their_bad_samples_listed(tmp_path, tokenizer_folder):
    shard = tmp_path / "theirs.tar"
    with wds.TarWriter(str(shard)) as writer:
        writer.write({"__key__": "good", "json": {"domain": "ocr", "text": "INVOICE"}, "0.jpg": JPEG})
        writer.write({"__key__": "few", "json": {"domain": "interleaved", "text": "<image><image>"}, "0.jpg": JPEG})
        writer.write({"__key__": "caption", "txt": "A cat.", "jpg": JPEG})
        writer.write({"__key__": "none", "json": {"label": 3}, "jpg": JPEG})
    for _ in range(2):
        shown = run("index", tmp_path, "--tokenizer", tokenizer_folder)
        assert "samples: 2, rejected: 2" in shown
        listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
        assert [(entry["origin"], entry["reason"]) for entry in listed] == [
            ("theirs.tar/few", "media_mismatch"),
            ("theirs.tar/none", "unknown_domain"),
        ]
        assert not (tmp_path / ".build").exists()
    table = read_index(shard).table
    assert table.column("key").to_pylist() == ["good", "caption"]
    assert table.column("domain").to_pylist() == ["ocr", "image_text"]
    assert min(table.column("text_tokens").to_pylist()) > 4


def test_indexing_resumes_where_it_was_stopped(tmp_path, tokenizer_folder):
    for name in ("a", "b"):
        with wds.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            writer.write({"__key__": "good", "json": {"domain": "ocr", "text": name}, "0.jpg": JPEG})
            writer.write({"__key__": "none", "json": {"label": 3}, "jpg": JPEG})
    (tmp_path / "c.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:-12000])
    (tmp_path / "d.tar").write_bytes(b"no tar at all" * 99)
    command = ["index", tmp_path, "--tokenizer", tokenizer_folder, "--workers", 1]
    run(*command)
    whole = {path.name: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    assert len(set(whole["rejected.jsonl"][0].splitlines())) == 4
    (tmp_path / "b.index.arrow").unlink()
    run(*command)
    again = {path.name: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    assert {name: data for name, (data, _) in again.items()}.keys() == whole.keys()
    assert sorted(again["rejected.jsonl"][0].splitlines()) == sorted(whole["rejected.jsonl"][0].splitlines())
    for name in ("a.index.arrow", "b.index.arrow", "c.index.arrow", "catalogue.arrow"):
        assert again[name][0] == whole[name][0]
    assert again["a.index.arrow"][1] == whole["a.index.arrow"][1]  # not written again
    assert read_index(tmp_path / "c.tar").table.num_rows == 1


def test_verify_decodes_what_indexing_only_probed(records, tmp_path, tokenizer_folder):
    """An image with an intact header and truncated data is indexed by its header, and found by verify."""
    shard = tmp_path / "theirs.tar"
    with wds.TarWriter(str(shard)) as writer:
        writer.write({"__key__": "cut", "json": {"domain": "ocr", "text": "x"}, "0.jpg": JPEG[:-800]})
        writer.write({"__key__": "good", "json": {"domain": "ocr", "text": "x"}, "0.jpg": JPEG})
    run("index", shard, "--tokenizer", tokenizer_folder)
    shown = run("verify", shard, expect=1)
    assert "theirs.tar/cut: unreadable_image" in shown
    assert "unreadable_image │ 1" in shown


def test_verify_compares_with_the_manifest(records, tmp_path, tokenizer_folder):
    out = tmp_path / "out"
    write(records, GOOD * 30)
    run("build", "--input", records, "--out", out, "--tokenizer", tokenizer_folder, "--shard-bytes", "40K")
    assert "samples: 120" in run("verify", out, "--workers", 1)
    first, second, third = sorted(out.glob("*.tar"))[:3]
    shutil.copy(third, out / "unlisted.tar")
    damaged = bytearray(first.read_bytes())
    damaged[2048] ^= 1
    first.write_bytes(damaged)
    second.unlink()
    shown = run("verify", out, "--tokenizer", tokenizer_folder, "--workers", 1, expect=1)
    assert f"{second.name}: missing_shard" in shown
    assert "unlisted.tar: extra_shard" in shown
    assert f"{first.name}: wrong_checksum" in shown
    assert f"{first.name}: unusable_index" in shown  # it describes the tar as it was


def test_verify_compares_with_the_catalogue(records, tmp_path, tokenizer_folder):
    """A shard and its index are copied over older ones of the same name. Training would use the stale catalogue."""
    older, newer = tmp_path / "older", tmp_path / "newer"
    for out, given in ((older, GOOD[:2]), (newer, GOOD)):
        write(records, given)
        run("build", "--input", records, "--out", out, "--tokenizer", tokenizer_folder, "--name", "shard")
    (older / "manifest.json").unlink()
    for file in newer.glob("shard-*"):
        shutil.copy(file, older)
    shown = run("verify", older, "--workers", 1, expect=1)
    assert "shard-00000-00000.tar: wrong_catalogue" in shown
    (older / "catalogue.arrow").write_bytes(b"damage")
    assert "catalogue.arrow: wrong_catalogue" in run("verify", older, "--workers", 1, expect=1)
    run("index", older, "--tokenizer", tokenizer_folder)
    assert "samples: 4" in run("verify", older, "--workers", 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "--input", "nowhere.jsonl", "--out", "OUT"], "error: input nowhere.jsonl does not exist"),
        (["build", "--input", "RECORDS", "--out", "OUT", "--tokenizer", "OUT"], "tokenizer.json does not exist"),
        (
            ["build", "--input", "RECORDS", "--out", "OUT", "--chat-form", "gpt"],
            "--chat-form gpt is unknown: use glm45v",
        ),
        (
            ["build", "--input", "RECORDS", "--out", "OUT", "--shard-bytes", "much"],
            "--shard-bytes 'much' is not a size: write it as 5GB",
        ),
        (["build", "--input", "RECORDS", "--out", "OUT", "--kind", "jsnl"], "unknown: did you mean jsonl?"),
        (
            ["build", "--input", "RECORDS", "--out", "OUT", "--set", "domian=ocr"],
            "no such option of kind jsonl: did you mean domain?",
        ),
        (["build", "--input", "RECORDS", "--out", "OUT", "--set", "allow_outside=maybe"], "give true or false"),
        (["build", "--input", "RECORDS", "--out", "OUT", "--part", "2/2"], "the first number is 0 to 1"),
        (["build", "--input", "RECORDS", "--out", "OUT", "--part", "0/0"], "give 1 or more after the slash"),
        (["build", "--input", "RECORDS", "--out", "OUT", "--array"], "not a job of a SLURM array"),
        (["build", "--input", "RECORDS", "--out", "OUT", "--executor", "dask"], "dask is unknown: use here, processes"),
        (
            ["build", "--input", "RECORDS", "--out", "OUT", "--executor", "here", "--workers", "2"],
            "--workers 2 has no effect with --executor here",
        ),
        (["build", "--input", "RECORDS", "RECORDS", "--out", "OUT"], "records.jsonl is given twice"),
        (["build", "--input", "IN", "--kind", "jsonl", "--out", "IN/OUT"], "/OUT lies in the input"),
        (["build", "--out", "OUT"], "nothing to build from: give files or folders with --input"),
        (["stats", "BUILT", "--plot", "a.xyz"], "--plot a.xyz: its name must end in one of"),
        (["index", "OUT"], "holds no shards"),
        (["verify", "nowhere"], "error: nowhere does not exist"),
        (["stats", "RECORDS"], "records.tar has no index"),
        (
            ["stats", "BUILT", "--image-max-tokens", "0"],
            "'--image-max-tokens': Input should be greater than or equal to 8",
        ),
    ],
)
def test_mistake_in_the_call_is_one_line(records, tmp_path, arguments, says):
    write(records, GOOD)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "records.tar").write_bytes(b"x")
    if "BUILT" in arguments:
        run("build", "--input", records, "--out", tmp_path / "built")
    places = {
        "RECORDS": records,
        "OUT": out,
        "BUILT": tmp_path / "built",
        "IN": records.parent,
        "IN/OUT": records.parent / "OUT",
    }
    if arguments[0] == "stats":
        places["RECORDS"] = tmp_path / "records.tar"
    shown = run(*(places.get(argument, argument) for argument in arguments), expect=2)
    assert says in shown
    assert "Traceback" not in shown


def test_folder_belongs_to_one_build(records, tmp_path, tokenizer_folder):
    write(records, GOOD)
    build = ["build", "--input", records, "--out", tmp_path / "out"]
    run(*build)
    assert "is finished already: nothing to do" in run(*build)
    for change, says in [
        (["--shard-bytes", "1M"], "shard_bytes was 1073741824 and is 1048576"),
        (["--set", "domain=ocr"], "inputs options domain was '' and is 'ocr'"),
        (["--tokenizer", tokenizer_folder], "tokenizer was '' and is"),
        (["--name", "other"], "name was 'out' and is 'other'"),
    ]:
        assert says in run(*build, *change, expect=2)
    write(records, [*GOOD[1:], GOOD[0]])
    assert "inputs files records.jsonl sha256 was" in run(*build, expect=2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x.tar").write_bytes(b"x")
    shown = run("build", "--input", records, "--out", tmp_path / "theirs", expect=2)
    assert "x.tar does not belong to this build: choose an empty folder" in shown


def test_build_without_a_sample_is_an_error(records, tmp_path):
    write(records, ["not JSON"])
    assert "no sample could be used: see" in run("build", "--input", records, "--out", tmp_path / "out", expect=2)


def test_folders_without_shards_are_named_and_skipped(records, tmp_path):
    """`stats shards/*` meets such folders. Only if no folder has shards is that an error."""
    good, kept_nothing, none = (tmp_path / name for name in ("good", "kept_nothing", "none"))
    write(records, GOOD)
    run("build", "--input", records, "--out", good)
    write(records, ["not JSON"])
    run("build", "--input", records, "--out", kept_nothing, expect=2)
    none.mkdir()
    named = f"{kept_nothing} holds no shards (*.tar): its rejected.jsonl says why"
    shown = run("stats", none, kept_nothing, good)
    assert shown.startswith(f"{none} holds no shards (*.tar): make some with `python -m tools.shard build` {named} ")
    assert shown.endswith(run("stats", good))
    assert run("stats", kept_nothing, none, expect=2).startswith(f"error: {named}; {none} holds no shards")
    for typed, says in (("goood/*.tar", "goood is not a folder"), ("good/train-9*.tar", "matches none of the")):
        assert says in run("stats", good, tmp_path / typed, expect=2)  # a pattern without matches is a typing error

    with wds.TarWriter(str(none / "theirs.tar")) as writer:
        writer.write({"__key__": "0", "json": {"label": 3}})
    run("index", none)
    assert f"no sample is indexed in {none}: see rejected.jsonl" in run("stats", none, expect=2)
    assert run("stats", none, good) == run("stats", good)


def test_jobs_of_a_slurm_array_share_a_build(records, tmp_path, monkeypatch):
    """Each job does its part. An array with gaps in its numbers is an error."""
    write(records, GOOD)
    for number in range(3):
        shutil.copy(records, records.with_name(f"records{number}.jsonl"))
    build = [
        "build",
        "--input",
        records.parent,
        "--kind",
        "jsonl",
        "--out",
        tmp_path / "out",
        "--array",
        "--workers",
        1,
    ]
    for name, value in (("ID", 4), ("MIN", 4), ("MAX", 5), ("COUNT", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    run(*build, "--shard-bytes", "8K")
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert "samples: 16" in run(*build, "--shard-bytes", "8K")
    assert (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    assert "numbers have gaps" in run(*build, "--shard-bytes", "8K", expect=2)


def test_command_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "tools.shard", "verify", tmp_path / "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_workers_end_with_a_build_that_is_killed(records, tmp_path):
    """After SIGKILL no worker process is left, and the same command finishes the build."""
    write(records, GOOD * 4)
    for number in range(8):
        shutil.copy(records, records.with_name(f"records{number}.jsonl"))
    build = ["build", "--input", str(records.parent), "--kind", "jsonl", "--out", str(tmp_path / "out")]
    build += ["--shard-bytes", "20K", "--workers", "2"]
    command = subprocess.Popen([sys.executable, "-m", "tools.shard", *build], stderr=subprocess.DEVNULL)
    main = psutil.Process(command.pid)
    workers: list[psutil.Process] = []
    while len(workers) < 2 and command.poll() is None:
        workers = [child for child in main.children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.02)
    command.kill()
    command.wait()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert "samples: 144" in run(*build, "--workers", "1")


def test_shards_given_twice_count_once(records, tmp_path):
    write(records, GOOD)
    run("build", "--input", records, "--out", tmp_path / "out")
    once = run("stats", tmp_path / "out")
    assert run("stats", tmp_path / "out", f"{tmp_path}/out/*.tar") == once


def test_brackets_in_a_path_are_printed(records, tmp_path):
    """The library that prints tables would take them for markup."""
    write(records, [GOOD[0], "not JSON"])
    out = tmp_path / "a[b]" / "c[" / "d]"
    assert f"see {out}/rejected.jsonl" in run("build", "--input", records, "--out", out)


def test_tables_and_help_fit_any_terminal():
    """The table of a large data set fits its fixed width, and help keeps one command per line."""
    stats = {"interleaved": DomainStats(tokens=[np.full(1000, 123_456_789)], bytes=10**12)}
    printed = io.StringIO()
    Console(file=printed, width=WIDEST).print(table_of(stats))
    assert "interleaved 1,000 0 0 123,456,789,000 123,456,789 123,456,789 123,456,789 1.0 TB" in " ".join(
        printed.getvalue().split()
    )
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "\n      python -m tools.shard verify SHARDS...\n" in shown


def test_shards_are_named_after_their_folder(records, tmp_path):
    """The logs of a run can then tell two sources apart. Inputs may also be given without --input."""
    write(records, GOOD)
    for folder, name in (("pets", "pets"), ("my pets (2)", "my-pets-2"), (".x", "x")):
        shown = run("build", records, "--out", tmp_path / folder)
        assert f"tools.shard index {tmp_path / folder} --tokenizer DIR" in shown
        assert (tmp_path / folder / f"{name}-00000-00000.tar").is_file()
