"""Folders of images and videos with captions beside them."""

from __future__ import annotations

import csv
import json
import unicodedata

import pytest

from data_pipeline.inputs.draft import Draft, Media
from data_pipeline.inputs.records import folder
from tests.data_pipeline.inputs.reading import JPEG, MP4, PNG, opened, read

pytestmark = pytest.mark.fast


def test_captions_are_read_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "UNIT_BYTES", 1)
    root = tmp_path / "pets"
    metadata_lines = [b'{"file_name": "c.mp4", "text": "It runs."}', b'{"file_name": "gone.jpg", "text": "?"}', b"bad"]
    files: dict[str, bytes] = {
        "a.jpg": JPEG,
        "a.txt": "A cat.\n".encode("utf-8-sig"),
        "b.png": PNG,
        "b.json": json.dumps({"caption": "A dog.", "license": "own"}).encode(),
        "sub/c.mp4": MP4,
        "sub/d.jpg": JPEG,
        "sub/metadata.jsonl": b"\n".join(metadata_lines),
        "metadata.csv": b'file_name,text\nsub/d.jpg,"Four, here."\n',
        "none.jpg": JPEG,
        "empty.jpg": JPEG,
        "empty.txt": b" \n",
        "latin.jpg": JPEG,
        "latin.txt": "é".encode("latin-1"),
        "e.heic": b"x",
        ".hidden.jpg": JPEG,
        "README.txt": b"about",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "secret.jpg").write_bytes(JPEG)
    (root / "secret.txt").symlink_to("/etc/hostname")
    drafts, rejected = read(opened(root))
    assert {draft.origin: draft.record for draft in drafts} == {
        "pets/a.jpg": {"domain": "image_text", "text": "A cat."},
        "pets/b.png": {"domain": "image_text", "text": "A dog.", "license": "own"},
        "pets/sub/c.mp4": {"domain": "video", "text": "It runs."},
        "pets/sub/d.jpg": {"domain": "image_text", "text": "Four, here."},
    }
    assert [draft.origin for draft in drafts] == sorted(draft.origin for draft in drafts)
    assert {(entry.origin, entry.reason) for entry in rejected} == {
        ("pets/none.jpg", "no_caption"),
        ("pets/empty.jpg", "no_caption"),
        ("pets/latin.jpg", "not_utf8"),
        ("pets/README.txt", "missing_file"),
        ("pets/e.heic", "no_caption"),
        ("pets/secret.jpg", "outside_folder"),
        ("pets/sub/metadata.jsonl", "missing_file"),
        ("pets/sub/metadata.jsonl", "bad_record"),
    }
    drafts, _ = read(opened(root, settings=["domain=ocr"]))
    assert {draft.record["domain"] for draft in drafts} == {"ocr"}


def test_single_video_is_read_with_its_caption(tmp_path):
    (tmp_path / "dog.mp4").write_bytes(MP4)
    (tmp_path / "dog.txt").write_text("A dog.")
    (tmp_path / "other.jpg").write_bytes(JPEG)
    assert read(opened(tmp_path / "dog.mp4")) == (
        [Draft({"domain": "video", "text": "A dog."}, videos=[Media("mp4", MP4)], origin="dog.mp4")],
        [],
    )


def test_video_with_subtitles_is_rejected_with_the_kind_that_reads_them(tmp_path):
    (tmp_path / "dog.mp4").write_bytes(MP4)
    (tmp_path / "dog.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nA dog.\n")
    _, [entry] = read(opened(tmp_path / "dog.mp4"))
    assert entry.reason == "no_caption"
    assert "dog.srt is read with --kind clips" in entry.detail


def test_file_names_match_in_any_unicode_form_and_suffixes_in_any_case(tmp_path):
    root = tmp_path / "pets"
    root.mkdir()
    composed, decomposed = (unicodedata.normalize(form, "Café.jpg") for form in ("NFC", "NFD"))
    (root / decomposed).write_bytes(JPEG)  # as macOS stores names
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": composed, "text": "A cup."}) + "\n")
    (root / "B.JPG").write_bytes(JPEG)
    (root / "B.TXT").write_text("A bee.")
    (root / unicodedata.normalize("NFC", "étang.jpg")).write_bytes(JPEG)
    (root / unicodedata.normalize("NFD", "étang.Txt")).write_text("A pond.")
    drafts, rejected = read(opened(root))
    assert ([draft.record["text"] for draft in drafts], rejected) == (["A bee.", "A cup.", "A pond."], [])

    (root / "a.jsonl").write_text(json.dumps({"domain": "image_text", "text": "A cup.", "images": [composed]}))
    [draft], _ = read(opened(root / "a.jsonl"))
    assert draft.images == [Media("jpg", JPEG)]


def test_csv_of_captions_is_read_as_python_wrote_it(tmp_path):
    rows = [{"file_name": f"{n}.jpg", "text": f'line\n"{n}", ü'} for n in range(4)]
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(JPEG)
    drafts, rejected = read(opened(tmp_path))
    assert [draft.record["text"] for draft in drafts] == [row["text"] for row in rows]
    assert not rejected
