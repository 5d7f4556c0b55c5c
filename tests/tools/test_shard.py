"""The sharding command on real files, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset as wds
from typer.testing import CliRunner

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.cost import PackCost
from data_pipeline.index import read_index
from data_pipeline.loader import PackedLoader
from tests.data_pipeline.media import clip, encoded, pattern
from tools.shard import app

pytestmark = pytest.mark.fast

JPEG, PNG = encoded(pattern(60, 90), "JPEG"), encoded(pattern(90, 60, 1), "PNG")
GOOD = [
    {"domain": "image_text", "text": "A cat.", "images": ["a.jpg"]},
    {"domain": "interleaved", "text": "x <image> y <image>", "images": ["b.png", "a.jpg"]},
    {"domain": "video", "text": "A clip.", "videos": ["c.mp4"]},
    {"domain": "text", "text": "Words."},
]
BAD = [
    ({"domain": "interleaved", "text": "<image> <image>", "images": ["a.jpg"]}, "media_mismatch"),
    ({"domain": "image_text", "text": "x", "images": ["truncated.jpg"]}, "unreadable_image"),
    ({"domain": "image_text", "text": "x", "images": ["long.png"]}, "extreme_aspect"),
    ({"domain": "image_text", "text": "x", "images": ["gone.jpg"]}, "missing_file"),
    ({"domain": "image_text", "text": "x", "images": ["a.psd"]}, "unknown_extension"),
    ({"domain": "video", "text": "x", "videos": ["empty.mp4"]}, "video_without_frames"),
    ({"domain": "video", "text": "x", "videos": ["half.mp4"]}, "unreadable_video"),
    ({"domain": "picture", "text": "x"}, "unknown_domain"),
    ({"domain": "text", "text": "x", "images": "a.jpg"}, "bad_record"),
    ("not JSON", "bad_record"),
]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    files = {"a.jpg": JPEG, "b.png": PNG, "truncated.jpg": JPEG[:-800], "long.png": encoded(pattern(5, 2000), "PNG")}
    files |= {"c.mp4": clip(12), "empty.mp4": clip(0), "half.mp4": clip(30)[:1500]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "records.jsonl"


def write(records: Path, lines: list) -> None:
    records.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def run(*arguments: object, expect: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == expect, result.output
    return " ".join(result.output.split())


def test_from_records_to_batches(records, tmp_path, tokenizer_folder):
    out = tmp_path / "shards"
    write(records, GOOD * 3)
    shown = run("build", "--input", records, "--out", out, "--tokenizer", tokenizer_folder, "--name", "mix")
    assert "shards: 1, samples: 12" in shown
    assert "rejected" not in shown
    assert (out / "rejected.jsonl").read_text() == ""

    stored = list(wds.WebDataset(str(out / "mix-00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in stored] == [f"{number:09d}" for number in range(12)]
    assert (stored[1]["0.png"], stored[1]["1.jpg"]) == (PNG, JPEG)
    assert json.loads(stored[0]["json"]) == {"domain": "image_text", "text": "A cat."}

    assert "shards: 1, samples: 12" in run("verify", out, "--tokenizer", tokenizer_folder)
    assert "interleaved 3 6 0" in run("stats", out, "--picture", tmp_path / "stats.png")
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
    assert not batch.rejected


def test_bad_records_are_counted_and_listed(records, tmp_path, tokenizer_folder):
    write(records, [GOOD[0], *(record for record, _ in BAD), GOOD[3]])
    shown = run("build", "--input", records, "--out", tmp_path / "out", "--tokenizer", tokenizer_folder)
    assert f"rejected: {len(BAD)} (2 bad_record" in shown
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["reason"]) for entry in listed] == [
        (f"{number:09d}", reason) for number, (_, reason) in enumerate(BAD, start=1)
    ]
    assert all(entry["shard"] == "records.jsonl" and entry["detail"] for entry in listed)
    assert read_index(tmp_path / "out" / "shard-00000.tar").table.column("key").to_pylist() == [
        "000000000",
        "000000011",
    ]


def test_shards_of_someone_else(tmp_path, tokenizer_folder):
    shard = tmp_path / "theirs.tar"
    with wds.TarWriter(str(shard)) as writer:
        writer.write({"__key__": "good", "json": {"domain": "ocr", "text": "INVOICE"}, "0.jpg": JPEG})
        writer.write({"__key__": "few", "json": {"domain": "interleaved", "text": "<image><image>"}, "0.jpg": JPEG})
        writer.write({"__key__": "caption", "txt": "A cat.", "jpg": JPEG})
        writer.write({"__key__": "none", "json": {"label": 3}, "jpg": JPEG})
    for _ in range(2):
        shown = run("index", tmp_path, "--tokenizer", tokenizer_folder)
        assert "2 rejected" in shown
        listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
        assert [(entry["shard"], entry["key"], entry["reason"]) for entry in listed] == [
            ("theirs.tar", "few", "media_mismatch"),
            ("theirs.tar", "none", "unknown_domain"),
        ]
    table = read_index(shard).table
    assert table.column("key").to_pylist() == ["good", "caption"]
    assert table.column("domain").to_pylist() == ["ocr", "image_text"]
    assert min(table.column("text_tokens").to_pylist()) > 4


def test_verify_finds_what_has_changed_on_disk(records, tmp_path, tokenizer_folder):
    """A picture whose header is fine but whose data is cut is indexed by its header, and found by verify."""
    shard = tmp_path / "theirs.tar"
    with wds.TarWriter(str(shard)) as writer:
        writer.write({"__key__": "cut", "json": {"domain": "ocr", "text": "x"}, "0.jpg": JPEG[:-800]})
        writer.write({"__key__": "good", "json": {"domain": "ocr", "text": "x"}, "0.jpg": JPEG})
    run("index", shard, "--tokenizer", tokenizer_folder)
    shown = run("verify", shard, expect=1)
    assert "theirs.tar/cut: unreadable_image" in shown
    assert "rejected: 1 (1 unreadable_image)" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "--input", "nowhere.jsonl", "--out", "OUT"], "error: nowhere.jsonl does not exist"),
        (["build", "--input", "RECORDS", "--out", "OUT", "--tokenizer", "OUT"], "tokenizer.json does not exist"),
        (
            ["build", "--input", "RECORDS", "--out", "OUT", "--chat-form", "gpt"],
            "--chat-form gpt is unknown: use glm45v",
        ),
        (["index", "OUT"], "holds no shards"),
        (["verify", "nowhere"], "error: nowhere does not exist"),
        (["stats", "RECORDS"], "records.tar has no index"),
    ],
)
def test_a_mistake_is_one_line(records, tmp_path, arguments, says):
    write(records, GOOD)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "records.tar").write_bytes(b"x")
    places = {"RECORDS": records, "OUT": out}
    if arguments[0] == "stats":
        places["RECORDS"] = tmp_path / "records.tar"
    shown = run(*(places.get(argument, argument) for argument in arguments), expect=2)
    assert says in shown
    assert "Traceback" not in shown


def test_existing_shards_are_not_written_over(records, tmp_path):
    write(records, GOOD)
    run("build", "--input", records, "--out", tmp_path / "out")
    assert "shard-00000.tar exists: choose another --name or --out" in run(
        "build", "--input", records, "--out", tmp_path / "out", expect=2
    )


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "tools.shard", "verify", tmp_path / "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
