"""Records in JSON lines and JSON lists, and the files that they name."""

from __future__ import annotations

import base64
import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.records import jsonl
from tests.data_pipeline.inputs.reading import JPEG, PNG, opened, read

pytestmark = pytest.mark.fast


def test_every_line_is_read_once_for_any_unit_size(tmp_path, monkeypatch):
    lines = [json.dumps({"domain": "text", "text": "ä" * (n % 50)}, ensure_ascii=False) for n in range(300)]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\r\n".join(lines) + "\n\n \n{broken\n[1]\n" + lines[7], encoding="utf-8")
    drafts, rejected = read(opened(path))
    for unit_bytes in (1, 100, 3000):
        monkeypatch.setattr(jsonl, "UNIT_BYTES", unit_bytes)
        assert len(opened(path).units()) > 1
        assert read(opened(path)) == (drafts, rejected)
    assert [draft.record for draft in drafts] == [*map(json.loads, lines), json.loads(lines[7])]
    assert [draft.origin for draft in drafts] == [*(f"a.jsonl:{n}" for n in range(1, 301)), "a.jsonl:305"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [(f"a.jsonl:{n}", "bad_record") for n in (303, 304)]


def test_line_that_exceeds_the_limit_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "{" + "x" * 5000 + '}\n{"text": "b"}\n' + "y" * 3000)
    drafts, rejected = read(opened(path))
    assert [draft.record["text"] for draft in drafts] == ["a", "b"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.jsonl:2", "member_too_large"),
        ("a.jsonl:4", "member_too_large"),
    ]


def test_long_line_counts_once_in_the_estimated_size(tmp_path):
    (tmp_path / "big.jpg").write_bytes(bytes(1_000_000))
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a", "images": ["big.jpg"]}', '{"text": "' + "x" * 100_000 + '"}', '{"text": "b"}']
    path.write_text("\n".join(lines) + "\n")
    estimated = sum(unit.bytes for unit in opened(path).units())
    assert estimated == pytest.approx(path.stat().st_size + 1_000_000, rel=0.01)


def test_one_object_over_many_lines_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [], "annotations": []}, indent=1))
    with pytest.raises(DataError, match=r"one object over many lines: .*--kind grounding"):
        opened(path).units()


def test_media_under_a_field_that_is_not_read_are_rejected(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    records = [
        {"domain": "grounding", "text": "The cat [[1,2,3,4]].", "image": "a.jpg"},
        {"domain": "chat", "messages": turns, "video": "a.mp4"},
        {"domain": "text", "text": "About an image.", "image": "a.jpg"},
        {"messages": turns, "image": "a.jpg"},  # LLaVA's name for it
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    drafts, rejected = read(opened(path))
    assert [draft.origin for draft in drafts] == ["a.jsonl:3", "a.jsonl:4"]
    assert [entry.detail for entry in rejected] == [
        '"image" is not read here: write "images": ["a.jpg"]',
        '"video" is not read here: write "videos": ["a.mp4"]',
    ]


def test_json_list_is_read_entry_by_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "UNIT_BYTES", 100)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "a.json"
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    path.write_text(json.dumps([{"conversations": turns, "image": "a.jpg"}] * 5 + [3], indent=1))
    drafts, rejected = read(opened(path))
    assert [draft.origin for draft in drafts] == [f"a.json:{number}" for number in range(1, 6)]
    assert drafts[0].record["messages"][1] == {"role": "assistant", "content": "A cat."}
    assert drafts[0].images == [Media("jpg", JPEG)]
    assert [entry.origin for entry in rejected] == ["a.json:6"]


@pytest.mark.parametrize("name", ["a.json", "metadata.jsonl"])
def test_changed_file_is_read_again(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for text in ("before", "after"):
        record = {"file_name": "a.jpg", "images": ["a.jpg"], "domain": "image_text", "text": text}
        (tmp_path / name).write_text(json.dumps([record] if name == "a.json" else record))
        drafts, _ = read(opened(tmp_path / "a.json" if name == "a.json" else tmp_path))
        assert [draft.record["text"] for draft in drafts] == [text]


def test_files_outside_the_folder_of_the_records_are_rejected(tmp_path):
    outside, folder = tmp_path / "outside.jpg", tmp_path / "in"
    outside.write_bytes(JPEG)
    folder.mkdir()
    (folder / "link.jpg").symlink_to(outside)
    (folder / "endless.jpg").symlink_to("/dev/zero")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "own.jpg").write_bytes(JPEG)
    (folder / "own_link.jpg").symlink_to("own.jpg")
    data_uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    reasons = {
        "own.jpg": None,
        "../in/own.jpg": None,
        "own_link.jpg": None,
        data_uri: None,
        "../outside.jpg": "outside_folder",
        str(outside): "outside_folder",
        "link.jpg": "outside_folder",
        "endless.jpg": "outside_folder",
        "../../../../etc/passwd": "outside_folder",
        "loop.jpg": "missing_file",
        "a\0.jpg": "missing_file",
        "gone.jpg": "missing_file",
        "own.exe": "unknown_extension",
        "s3://bucket/a.jpg": "remote_file",
        "data:image/png;base64,AAAA": "unknown_extension",
    }
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "", "images": [name]}) + "\n" for name in reasons))
    drafts, rejected = read(opened(path))
    found = {entry.origin: entry.reason for entry in rejected}
    assert [found.get(f"a.jsonl:{number}") for number in range(1, len(reasons) + 1)] == list(reasons.values())
    assert [draft.images[0] for draft in drafts] == [*[Media("jpg", JPEG)] * 3, Media("png", PNG)]
    _, rejected = read(opened(path, settings=["allow_outside=true"]))
    assert "outside_folder" not in {entry.reason for entry in rejected}
    assert {entry.origin: entry.reason for entry in rejected}["a.jsonl:8"] == "missing_file"  # not a regular file
