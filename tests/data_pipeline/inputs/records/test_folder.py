"""Folders of images and videos with captions beside them."""

from __future__ import annotations

import csv
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.inputs.draft import Draft, Input, Media, NotRead
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.inputs.records import folder_files
from tests.data_pipeline.inputs.reading import JPEG, MP4, PNG, opened, read

pytestmark = pytest.mark.fast


def test_captions_are_read_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_files, "UNIT_BYTES", 1)
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
        [Draft({"domain": "video", "text": "A dog."}, videos=(Media("mp4", MP4),), origin="dog.mp4")],
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
    assert list(draft.images) == [Media("jpg", JPEG)]


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


def not_read(given: Input) -> Counter[str]:
    """Return the names of what is not read."""
    entries = [entry for unit in given.units() for entry in given.read(unit)]
    return sum((Counter({e.name: e.count}) for e in entries if isinstance(e, NotRead)), Counter())


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


SEVERAL = [("a.jpg", "first"), ("a.jpg", "second"), ("b.jpg", "cap b"), ("a.jpg", "third")]


def test_lines_that_name_one_image_are_samples_of_their_own(tmp_path: Path) -> None:
    table = "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in SEVERAL)
    of_json = lines(*({"file_name": name, "text": text} for name, text in SEVERAL))
    for metadata in ({"metadata.jsonl": of_json}, {"metadata.csv": table}):
        root = write(tmp_path / next(iter(metadata)), {"a.jpg": JPEG, "b.jpg": PNG, **metadata})
        drafts, rejected = read(opened(root))
        assert rejected == []
        texts = [draft.record["text"] for draft in drafts]
        assert texts == ["first", "second", "third", "cap b"]
        assert [draft.items for draft in drafts if draft.items] == [{"files": 1, "lines": 3}, {"files": 1, "lines": 1}]
        for captions, expected in (("first", {"first"}), ("random", {"first", "second", "third"})):
            given = opened(root, settings=[f"captions={captions}"])
            drafts, _ = read(given)
            assert [draft.record["text"] for draft in drafts][1:] == ["cap b"]
            assert drafts[0].record["text"] in expected
            assert not_read(given) == {"caption not chosen": 2}


def test_every_caption_that_is_not_read_is_counted(tmp_path: Path) -> None:
    row = {"file_names": ["a.jpg", "b.png"], "captions": ["<image><image> x", "", "y", "z"]}
    root = write(tmp_path / "rows", {"a.jpg": JPEG, "b.png": PNG, "metadata.jsonl": lines(row)})
    for captions, lost in (("all", {}), ("first", {"caption not chosen": 2}), ("random", {"caption not chosen": 2})):
        given = opened(root, settings=[f"captions={captions}"])
        read(given)
        assert not_read(given) == {**lost, "caption without text": 1}
    table = 'file_name,text\na.jpg,A cat, asleep\nb.png,"A dog, awake",\n'
    root = write(tmp_path / "table", {"a.jpg": JPEG, "b.png": PNG, "metadata.csv": table})
    drafts, rejected = read(opened(root))
    assert [draft.record["text"] for draft in drafts] == ["A dog, awake"]
    assert [entry.reason for entry in rejected] == ["no_caption", "bad_record"]
    assert "put quotes around" in rejected[1].detail


def test_the_named_field_is_the_caption(tmp_path: Path) -> None:
    files = {"a.jpg": JPEG, "a.json": b'{"text": "no", "summary": "yes"}', "b.jpg": JPEG}
    root = write(tmp_path, {**files, "b.json": b'{"text": "", "caption": "yes"}'})
    assert [draft.record["text"] for draft in read(opened(root))[0]] == ["no", "yes"]
    given = opened(root, settings=["text=summary"])
    drafts, _ = read(given)
    assert [draft.record["text"] for draft in drafts] == ["yes"]
    assert not_read(given)["field text"] == 1


def test_chat_beside_its_image_is_read_as_in_a_file_of_chats(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Where?", "detail": 1}, {"role": "assistant", "content": "<bbox>"}]
    record = {"messages": turns, "image": "elsewhere/a.jpg", "objects": {"bbox": [[6, 4, 30, 20]]}}
    root = write(tmp_path / "x", {"a.jpg": JPEG, "a.json": json.dumps(record).encode()})
    (root / "link").symlink_to(tmp_path)
    given = opened(root)
    [draft], _ = read(given)
    assert [turn["content"] for turn in draft.record["messages"]] == ["<image>Where?", "[[100,100,500,500]]"]
    assert draft.items == {"files": 2, "messages": 2}
    assert draft.not_read == {"field image": 1}
    assert not_read(given) == {"link to a folder": 1}


def test_json_beside_a_text_file_is_counted(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.jpg": JPEG, "a.txt": "A cat.", "a.json": b'{"caption": "no"}', "a.png": PNG})
    given = opened(root)
    drafts, _ = read(given)
    assert [(draft.record["text"], draft.items) for draft in drafts] == [
        ("A cat.", {"files": 2}),
        ("A cat.", {"files": 1}),
    ]
    assert not_read(given) == {"caption file beside another one": 1}


@pytest.mark.parametrize(
    "record",
    [
        {"captions": ["A cat.", "A pet."]},
        {"caption": ["A cat.", "A pet."]},
        {"sentences": ["A cat.", "", "A pet."]},
        {"caption_0": "A cat.", "caption_1": "A pet."},
        {"text1": "A cat.", "text2": "A pet."},
    ],
)
def test_several_captions_in_one_record_are_samples_of_their_own(tmp_path: Path, record: dict[str, Any]) -> None:
    root = write(tmp_path / "pets", {"a.jpg": JPEG, "b.jpg": JPEG, "b.json": json.dumps({**record, "license": "own"})})
    write(root, {"metadata.jsonl": lines({"file_name": "a.jpg", **record})})
    drafts, rejected = read(opened(root))
    assert rejected == []
    assert [draft.record["text"] for draft in drafts] == ["A cat.", "A pet."] * 2
    assert drafts[-1].record == {"domain": "image_text", "text": "A pet.", "license": "own"}


def test_caption_of_an_unknown_field_is_asked_for(tmp_path: Path) -> None:
    metadata = lines({"file_name": "a.jpg", "prompt": "A cat."})
    root = write(tmp_path / "pets", {"a.jpg": JPEG, "metadata.jsonl": metadata})
    drafts, [entry] = read(opened(root))
    assert (drafts, entry.reason, entry.items) == ([], "no_caption", {"files": 1, "lines": 1})
    assert "its fields with text are prompt: --set text=FIELD" in entry.detail
    [draft], _ = read(opened(root, settings=["text=prompt"]))
    assert draft.record["text"] == "A cat."


@pytest.mark.parametrize(
    "names",
    [
        {"file_names": ["a.jpg", "b.jpg"]},
        {"before_file_name": "a.jpg", "after_file_name": "b.jpg"},
        {"image_file_names": ["a.jpg", "b.jpg"]},
    ],
)
def test_line_with_several_images_is_one_sample(tmp_path: Path, names: dict[str, Any]) -> None:
    metadata = lines(
        {**names, "text": "Make it red."},
        {**names, "text": "Then <image> and <image>."},
        {"file_names": ["no.jpg", "a.jpg"], "text": "x"},
    )
    root = write(
        tmp_path / "pets", {"a.jpg": JPEG, "b.jpg": PNG, "c.jpg": JPEG, "c.txt": "A cat.", "metadata.jsonl": metadata}
    )
    drafts, [entry] = read(opened(root))
    assert [draft.record["text"] for draft in drafts] == [
        "A cat.",
        "<image><image>Make it red.",
        "Then <image> and <image>.",
    ]
    assert [len(draft.images) for draft in drafts] == [1, 2, 2]
    assert drafts[1].images == (Media("jpg", JPEG), Media("png", PNG))
    assert entry.reason == "missing_file"


def test_every_file_of_a_folder_has_a_fate(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "README.md": "# Pets",
        "LICENSE": "MIT",
        ".gitattributes": "*.jpg filter=lfs",
        ".cache/x.jpg": JPEG,
        "Thumbs.db": b"x",
        "labels.yaml": "a: 1",
        "page.ts": "const a = 1",
        "photo": JPEG,
        "photo.txt": "An image without a suffix.",
        "a.jpg": JPEG,
        "a.txt": "A cat.",
        "a.json": "{}",
        "b.jpg": JPEG,
        "metadata.jsonl": lines({"file_name": "a.jpg", "text": "Not used."}, {"file_name": "b.jpg", "text": "A dog."}),
        "sub/metadata.csv": "file_name,text\n",
        "drawing.svg": "<svg/>",
    }
    root = write(tmp_path / "pets", files)
    given = opened(root, kind="folder")
    drafts, rejected = read(given)
    assert {draft.origin: draft.record["text"] for draft in drafts} == {
        "pets/a.jpg": "A cat.",
        "pets/b.jpg": "A dog.",
        "pets/photo": "An image without a suffix.",
    }
    assert [(entry.origin, entry.reason) for entry in rejected] == [("pets/drawing.svg", "unknown_extension")]
    assert not_read(given) == {
        "file .md": 1,
        "file LICENSE": 1,
        "file .db": 1,
        "file .yaml": 1,
        "file .ts": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "caption file beside another one": 1,
        "metadata line of a file with another caption": 1,
    }
    assert sum((Counter(given.given(unit)) for unit in given.units()), Counter()) == {"files": 13, "lines": 2}
    assert kinds_of(root) == ["folder"]


def kinds_of(path: Path) -> list[str]:
    return [kind for kind, _ in open_inputs([str(path)])]


def test_random_folders_lose_no_file_and_no_line(tmp_path: Path) -> None:
    """`read` checks that every file and line has a fate; here its number is counted by brute force."""
    rng = random.Random(3)
    for case in range(120):
        root = tmp_path / str(case)
        names = [f"{folder}{stem}" for folder in ("", "sub/", "v1.2/") for stem in ("a", "b.c", "d", "é")]
        suffixes = (".jpg", ".txt", ".json", ".mp4", ".md", "", ".JPG", ".svg", ".ts")
        content = {".jpg": JPEG, ".JPG": JPEG, ".mp4": MP4, ".json": b'{"caption": ["x", "y"]}', "": PNG}
        files: dict[str, bytes | str] = {"a.jpg": JPEG}
        for _ in range(rng.randint(1, 12)):
            suffix = rng.choice(suffixes)
            files[rng.choice(names) + suffix] = content.get(suffix, b"words")
        given_lines = 0
        for folder in rng.sample(("", "sub/", "v1.2/"), rng.randint(0, 3)):
            chosen = [rng.choice(("a.jpg", "sub/a.jpg", "d.mp4", "gone.jpg", "é.jpg", "b.c.jpg")) for _ in range(4)]
            rows: list[dict[str, Any]] = [{"file_name": name, "text": "x"} for name in chosen]
            rows += [{"file_names": rng.sample(("a.jpg", "d.jpg", "b.c.jpg"), 2), "text": "x"}, {"text": "no name"}]
            table = rng.random() < 0.3
            given_lines += 4 if table else 6
            files[f"{folder}metadata.csv" if table else f"{folder}metadata.jsonl"] = (
                "file_name,text\n" + "".join(f"{name},x\n" for name in chosen) if table else lines(*rows)
            )
        write(root, files)
        for captions in ("all", "random"):
            given = opened(root, kind="folder", settings=[f"captions={captions}"])
            read(given)
            total = sum((Counter(given.given(unit)) for unit in given.units()), Counter())
            metadata = sum(Path(name).name.startswith("metadata.") for name in files)
            assert (total["files"], total["lines"]) == (len(files) - metadata, given_lines)
