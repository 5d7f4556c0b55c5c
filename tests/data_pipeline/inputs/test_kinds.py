"""Kinds of input: what each makes of real files, and that a bad file among them costs nothing but itself."""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_pipeline.errors import DataError
from data_pipeline.inputs import kinds
from data_pipeline.inputs.draft import Draft, Input, Media, Rejected, Unit
from data_pipeline.inputs.kinds import INPUTS, Kind, describe_kinds, open_inputs
from data_pipeline.inputs.records import folder, jsonl
from data_pipeline.inputs.records.jsonl import JsonLines
from data_pipeline.inputs.records.parquet import Parquet
from data_pipeline.inputs.records.tars import Tars
from data_pipeline.sharding.tasks import MIN_TASK_BYTES, SMALL_BUILD_TASKS, cut_tasks
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

pytestmark = pytest.mark.fast

JPEG, PNG, MP4 = encoded(pattern(40, 60)), encoded(pattern(60, 40), "PNG"), encoded_video(4)


def read(given: Input) -> tuple[list[Draft], list[Rejected]]:
    """All drafts and rejections, every unit read twice and backwards: the outcome of a unit is its own."""
    units = given.units()
    forth = [list(given.read(unit)) for unit in units]
    back = [list(given.read(unit)) for unit in reversed(units)]
    assert forth == back[::-1]
    found = [entry for of_unit in forth for entry in of_unit]
    return [x for x in found if isinstance(x, Draft)], [x for x in found if isinstance(x, Rejected)]


def opened(*paths: Path, kind: str = "", settings: Sequence[str] = ()) -> Input:
    [(_, given)] = open_inputs([str(path) for path in paths], kind, settings)
    return given


# --- which kind, which options ----------------------------------------------------------------------------------------


def test_kinds_are_found_from_names_and_from_what_folders_hold(tmp_path):
    for name in (
        "a/x.jsonl",
        "a/sub/y.jsonl",
        "b/1.jpg",
        "b/metadata.jsonl",
        "c/s.tar",
        "c/t.jsonl",
        "d/readme",
        "packed/a.jsonl.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    [(kind, given)] = open_inputs([str(tmp_path / "a")])
    assert (kind, given) == ("jsonl", JsonLines((str(tmp_path / "a/sub/y.jsonl"), str(tmp_path / "a/x.jsonl"))))
    assert [kind for kind, _ in open_inputs([str(tmp_path / "b"), str(tmp_path / "a/x.jsonl")])] == ["folder", "jsonl"]
    assert [kind for kind, _ in open_inputs([str(tmp_path / "c")], "tars")] == ["tars"]
    assert [kind for kind, _ in open_inputs([str(tmp_path / "b/1.jpg")])] == ["folder"]
    for name in ("i2d/00000.tar", "i2d/00000.parquet", "i2d/00000_stats.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert open_inputs([str(tmp_path / "i2d")]) == [("tars", Tars((str(tmp_path / "i2d/00000.tar"),)))]
    (tmp_path / "i2d/00001.parquet").touch()
    for path, says in [
        ("i2d", "holds files of several kinds .*parquet"),
        ("c", "holds files of several kinds .*jsonl.*: say which with --kind"),
        ("d", "holds nothing of a known kind"),
        ("d/readme", "is of no known kind"),
        ("gone", "gone does not exist"),
        ("dpi=3", "does not exist: write --set before every option=value"),
        ("packed/a.jsonl.gz", "is compressed.* with gunzip"),
        ("packed", r"nothing of a known kind \(unpack a.jsonl.gz first, with gunzip\)"),
    ]:
        with pytest.raises(DataError, match=says):
            open_inputs([str(tmp_path / path)])
    assert all(name in describe_kinds() for name in INPUTS)


def test_a_clip_with_subtitles_says_which_kind_reads_them(tmp_path):
    (tmp_path / "dog.mp4").write_bytes(MP4)
    (tmp_path / "dog.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nA dog.\n")
    _, [entry] = read(opened(tmp_path / "dog.mp4"))
    assert entry.reason == "no_caption"
    assert "dog.srt is read with --kind clips" in entry.detail


def test_a_single_clip_with_its_caption(tmp_path):
    (tmp_path / "dog.mp4").write_bytes(MP4)
    (tmp_path / "dog.txt").write_text("A dog.")
    (tmp_path / "other.jpg").write_bytes(JPEG)
    assert read(opened(tmp_path / "dog.mp4")) == (
        [Draft({"domain": "video", "text": "A dog."}, videos=[Media("mp4", MP4)], origin="dog.mp4")],
        [],
    )


@dataclass(frozen=True)
class Sheets:
    """A kind with an option of every type."""

    paths: tuple[str, ...]
    dpi: int = 72
    scale: float = 1.0
    figures: bool = True
    fonts: tuple[str, ...] = ()
    style: Literal["plain", "scan"] = "plain"
    language: str | None = None


def test_options_are_the_fields_of_the_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "import_module", lambda name: type("module", (), {"Sheets": Sheets}))
    monkeypatch.setitem(INPUTS, "sheets", Kind("sheets:Sheets", (".sheet",), "for this test"))
    path = tmp_path / "a.sheet"
    path.touch()
    settings = ["dpi=150", "scale=0.5", "figures=no", "fonts=A, B", "style=scan", "language=de"]
    assert opened(path, settings=settings) == Sheets((str(path),), 150, 0.5, False, ("A", "B"), "scan", "de")
    for setting, says in [
        ("dpy=3", "no such option of kind sheets: did you mean dpi"),
        ("zzz=3", "options are dpi, figures, fonts, language, scale, style"),
        ("dpi=many", "--set dpi=many: give a whole number"),
        ("style=bold", "use one of plain, scan"),
        ("dpi", "write option=value"),
    ]:
        with pytest.raises(DataError, match=says):
            opened(path, settings=[setting])


def test_tasks_are_of_one_size_whatever_the_units():
    units = [(0, Unit("a", number, number + 1, bytes=1 << 20)) for number in range(1000)]
    tasks = cut_tasks(units, 100 << 20)
    assert [unit for task in tasks for unit in task.pieces] == units
    assert [task.number for task in tasks] == list(range(SMALL_BUILD_TASKS))
    assert max(task.bytes for task in tasks) - min(task.bytes for task in tasks) <= 1 << 20
    assert len(cut_tasks(units, 10 << 20)) == 100
    assert {task.bytes for task in cut_tasks(units[:40], 1 << 30)} <= {13 << 20, 14 << 20}
    assert len(cut_tasks([(0, Unit("a", bytes=MIN_TASK_BYTES - 1))], 1 << 30)) == 1
    assert len(cut_tasks([(0, Unit("a")), (0, Unit("b"))], 1 << 30)) == 1


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_lines_are_read_once_whatever_the_cuts(tmp_path, monkeypatch):
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


def test_a_line_too_long_to_be_held_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "{" + "x" * 5000 + '}\n{"text": "b"}\n' + "y" * 3000)
    drafts, rejected = read(opened(path))
    assert [draft.record["text"] for draft in drafts] == ["a", "b"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.jsonl:2", "member_too_large"),
        ("a.jsonl:4", "member_too_large"),
    ]


def test_a_long_line_is_looked_at_once_to_cut_tasks(tmp_path, monkeypatch):
    looked: list[bytes] = []

    def paths_named(line: bytes) -> list[str]:
        looked.append(line)
        return []

    monkeypatch.setattr(jsonl, "_paths_named", paths_named)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * 100_000 + '"}\n{"text": "b"}\n')
    opened(path).units()
    assert len(looked) == len(set(looked))


def test_one_object_over_many_lines_is_no_file_of_records(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [], "annotations": []}, indent=1))
    with pytest.raises(DataError, match=r"one object over many lines: .*--kind grounding"):
        opened(path).units()


def test_a_picture_under_a_name_that_is_not_read_does_not_vanish(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    records = [
        {"domain": "grounding", "text": "The cat [[1,2,3,4]].", "image": "a.jpg"},
        {"domain": "chat", "messages": turns, "video": "a.mp4"},
        {"domain": "text", "text": "About a picture.", "image": "a.jpg"},
        {"messages": turns, "image": "a.jpg"},  # as LLaVA names it
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    drafts, rejected = read(opened(path))
    assert [draft.origin for draft in drafts] == ["a.jsonl:3", "a.jsonl:4"]
    assert [entry.detail for entry in rejected] == [
        '"image" is not read here: write "images": ["a.jpg"]',
        '"video" is not read here: write "videos": ["a.mp4"]',
    ]


def test_a_list_in_one_file(tmp_path, monkeypatch):
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
def test_a_file_that_was_mended_is_read_anew(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for text in ("before", "after"):
        record = {"file_name": "a.jpg", "images": ["a.jpg"], "domain": "image_text", "text": text}
        (tmp_path / name).write_text(json.dumps([record] if name == "a.json" else record))
        drafts, _ = read(opened(tmp_path / "a.json" if name == "a.json" else tmp_path))
        assert [draft.record["text"] for draft in drafts] == [text]


def test_files_lie_below_the_records_or_are_refused(tmp_path):
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
    assert {entry.origin: entry.reason for entry in rejected}["a.jsonl:8"] == "missing_file"  # not a plain file


# --- Parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[Any], **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2, **options)
    return path


def test_parquet_as_hugging_face_writes_it(tmp_path):
    (tmp_path / "side.jpg").write_bytes(JPEG)
    rows = [
        {"image": {"bytes": JPEG, "path": None}, "caption": "A cat.", "score": 0.5, "raw": b"x"},
        {"image": {"bytes": None, "path": "side.jpg"}, "caption": "A dog.", "score": None, "raw": b"x"},
        {"image": {"bytes": None, "path": None}, "caption": "Nothing.", "score": 1.0, "raw": b"x"},
        {"image": {"bytes": b"no picture", "path": "a.dat"}, "caption": "Noise.", "score": 1.0, "raw": b"x"},
        {"image": {"bytes": MP4, "path": None}, "caption": "A clip.", "score": 1.0, "raw": b"x"},
        {"image": None, "caption": "Words.", "score": None, "raw": b"x"},
    ]
    given = opened(write_parquet(tmp_path / "a.parquet", rows))
    assert len(given.units()) == 3
    drafts, rejected = read(given)
    assert [draft.record for draft in drafts] == [
        {"domain": "image_text", "text": "A cat.", "score": 0.5},
        {"domain": "image_text", "text": "A dog."},
    ]
    assert [draft.images for draft in drafts] == [[Media("jpg", JPEG)]] * 2
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.parquet:3", "missing_file"),
        ("a.parquet:4", "unknown_extension"),
        ("a.parquet:5", "unknown_extension"),
        ("a.parquet:6", "missing_file"),
    ]
    drafts, _ = read(opened(tmp_path / "a.parquet", settings=["domain=text"]))
    assert drafts[-1].record == {"domain": "text", "text": "Words."}


def test_parquet_with_lists_chats_and_named_columns(tmp_path):
    lists = [{"images": [JPEG, PNG], "text": "<image> and <image>", "domain": "interleaved"}]
    drafts, _ = read(opened(write_parquet(tmp_path / "lists.parquet", lists)))
    assert drafts[0].images == [Media("jpg", JPEG), Media("png", PNG)]
    assert drafts[0].record == {"domain": "interleaved", "text": "<image> and <image>"}

    named = [{"left": JPEG, "right": PNG, "words": "two", "film": MP4}]
    path = write_parquet(tmp_path / "named.parquet", named)
    given = opened(path, settings=["text=words", "image=right,left", "video=film", "domain=interleaved"])
    [draft], _ = read(given)
    assert [*draft.images, *draft.videos] == [Media("png", PNG), Media("jpg", JPEG), Media("mp4", MP4)]

    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    [draft], _ = read(opened(write_parquet(tmp_path / "chat.parquet", [{"messages": turns, "images": [PNG]}])))
    assert draft.record["messages"][0]["content"] == "<image>What?"
    assert draft.images == [Media("png", PNG)]


def test_a_row_that_python_cannot_hold_costs_itself_only(tmp_path):
    texts = pa.array([b"one", b"\xff\xfe", b"three", b"four"])
    columns = {
        "text": pa.Array.from_buffers(pa.string(), len(texts), texts.buffers()),
        "at": pa.array([1, 2, 2**62, 3], pa.timestamp("us")),
        "made": pa.array([1_000_000_007] * 4, pa.timestamp("ns", "UTC")),
        "took": pa.array([1007] * 4, pa.duration("ns")),
        "raw": pa.array([b"x"] * 4).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    drafts, rejected = read(opened(tmp_path / "a.parquet"))
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.parquet:2", "bad_record"),
        ("a.parquet:3", "bad_record"),
    ]
    times = {"made": "1970-01-01 00:00:01+00:00", "took": "0:00:00.000001"}
    assert [draft.record for draft in drafts] == [
        {"domain": "text", "text": "one", "at": "1970-01-01 00:00:00.000001", **times},
        {"domain": "text", "text": "four", "at": "1970-01-01 00:00:00.000003", **times},
    ]


def test_texts_with_the_addresses_of_their_pages(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "A page.", "url": "http://x"}])
    [draft], _ = read(opened(path, settings=["domain=text"]))
    assert draft.record == {"domain": "text", "text": "A page.", "url": "http://x"}


@pytest.mark.parametrize(
    ("row", "settings", "says"),
    [
        ({"url": "http://x/a.jpg", "caption": "x"}, [], "column 'url' holds addresses, .*img2dataset.* domain=text"),
        ({"URL": "http://x/a.jpg", "TEXT": "x"}, ["text=TEXT"], "column 'URL' holds addresses"),
        ({"words": "x", "image": JPEG}, [], "which column is the text.* --set text=NAME; its columns are words, image"),
        ({"text": "x", "image": JPEG}, ["image=picture"], "has no column 'picture'"),
    ],
)
def test_parquet_that_cannot_be_used(tmp_path, row, settings, says):
    with pytest.raises(DataError, match=says):
        opened(write_parquet(tmp_path / "a.parquet", [row]), settings=settings).units()


def test_a_damaged_parquet_costs_its_row_group_only(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x" * 500 + str(n)} for n in range(6)], compression="snappy")
    about = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = about.dictionary_page_offset or about.data_page_offset
    data[start : start + about.total_compressed_size] = b"\xff" * about.total_compressed_size
    path.write_bytes(data)
    drafts, rejected = read(Parquet((str(path),)))
    assert len(drafts) == 4
    assert [(entry.origin, entry.reason) for entry in rejected] == [("a.parquet:3", "damaged_file")]
    path.write_bytes(data[:100])
    with pytest.raises(DataError, match="is not a Parquet file"):
        Parquet((str(path),)).units()


# --- folders and tars -------------------------------------------------------------------------------------------------


def test_folders_with_captions_of_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "UNIT_BYTES", 1)
    root = tmp_path / "pets"
    files: dict[str, bytes] = {
        "a.jpg": JPEG,
        "a.txt": "A cat.\n".encode("utf-8-sig"),
        "b.png": PNG,
        "b.json": json.dumps({"caption": "A dog.", "license": "own"}).encode(),
        "sub/c.mp4": MP4,
        "sub/d.jpg": JPEG,
        "sub/metadata.jsonl": b"\n".join(
            (b'{"file_name": "c.mp4", "text": "It runs."}', b'{"file_name": "gone.jpg", "text": "?"}', b"bad")
        ),
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
        ("pets/e.heic", "unknown_extension"),
        ("pets/secret.jpg", "outside_folder"),
        ("pets/sub/metadata.jsonl", "missing_file"),
        ("pets/sub/metadata.jsonl", "bad_record"),
    }
    drafts, _ = read(opened(root, settings=["domain=ocr"]))
    assert {draft.record["domain"] for draft in drafts} == {"ocr"}


def test_names_as_a_mac_spells_them_and_captions_in_capitals(tmp_path):
    """What a Mac copied has its accents as characters of their own, whatever the file of captions says."""
    root = tmp_path / "pets"
    root.mkdir()
    composed, decomposed = (unicodedata.normalize(form, "Café.jpg") for form in ("NFC", "NFD"))
    (root / decomposed).write_bytes(JPEG)
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


def test_tars_of_img2dataset_and_ours(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        about = {"caption": "A cat.", "url": "http://x/1.jpg", "status": "success", "width": 60}
        writer.write({"__key__": "000", "jpg": JPEG, "txt": "A cat.", "json": about})
        writer.write({"__key__": "001", "jpg": JPEG, "json": {"alt": "A dog."}})
        writer.write({"__key__": "002", "jpg": JPEG, "cls": 3})
        ours = {"domain": "interleaved", "text": "<image><image>", "source": "b.jsonl:1"}
        writer.write({"__key__": "003", "json": ours, "1.jpg": JPEG, "0.png": PNG})
    drafts, rejected = read(opened(tmp_path / "a.tar"))
    assert [draft.record for draft in drafts] == [{**about, "domain": "image_text", "text": "A cat."}, ours]
    assert drafts[1].images == [Media("png", PNG), Media("jpg", JPEG)]
    assert [draft.origin for draft in drafts] == ["a.tar/000", "a.tar/003"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.tar/001", "no_caption"),
        ("a.tar/002", "no_caption"),
    ]
    drafts, _ = read(opened(tmp_path / "a.tar", settings=["text=alt"]))
    assert drafts[1].record["text"] == "A dog."


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_caption_whose_picture_is_not_read_is_no_text(tmp_path):
    files = {"1.left.jpg": JPEG, "1.right.jpg": JPEG, "1.txt": b"Two views.", "._2.jpg": b"of a Mac", "2.txt": b"Lost."}
    path = write_tar(tmp_path / "a.tar", {**files, "3.jpg": JPEG, "3.mask.png": PNG, "3.txt": b"A cat."})
    drafts, rejected = read(opened(path))
    assert [(draft.origin, draft.images) for draft in drafts] == [("a.tar/3", [Media("jpg", JPEG)])]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.tar/1", "missing_member"),
        ("a.tar/2", "missing_member"),
    ]
    assert "1.right.jpg is not read, and nothing else goes with the text: name it KEY.jpg" in rejected[0].detail
    assert "--set domain=text" in rejected[1].detail
    drafts, _ = read(opened(path, settings=["domain=text"]))
    assert [draft.record["text"] for draft in drafts][:2] == ["Two views.", "Lost."]
    [draft], _ = read(opened(write_tar(tmp_path / "b.tar", {"1.txt": b"Words.", "._1.jpg": b"of a Mac"})))
    assert draft.record == {"domain": "text", "text": "Words."}


def test_conversations_in_tars(tmp_path):
    turns = [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "A cat."}]
    records = {
        "1": {"conversations": turns},
        "2": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]},
        "3": {"conversations": turns * 2},
    }
    files = {name: data for key, record in records.items() for name, data in _with_picture(key, record)}
    drafts, rejected = read(opened(write_tar(tmp_path / "a.tar", files)))
    said = [draft.record["messages"][0]["content"] for draft in drafts]
    assert said == ["What is <image>?", "<image>What?"]
    assert {draft.record["domain"] for draft in drafts} == {"chat"}
    assert [draft.images for draft in drafts] == [[Media("jpg", JPEG)]] * 2
    assert [(entry.origin, entry.reason) for entry in rejected] == [("a.tar/3", "media_mismatch")]


def _with_picture(key: str, record: dict[str, Any]) -> list[tuple[str, bytes]]:
    return [(f"{key}.json", json.dumps(record).encode()), (f"{key}.jpg", JPEG)]


def test_damaged_and_hostile_tars(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, data in [
            ("a.txt", b"A cat."),
            ("a.jpg", JPEG),
            ("../../b.txt", b"x"),
            ("c.txt", b"y"),
            ("c.jpg", JPEG),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "cut.tar").write_bytes(whole.getvalue()[: 1024 + 512 + len(JPEG)])
    (tmp_path / "odd.tar").write_bytes(whole.getvalue())
    (tmp_path / "no.tar").write_bytes(b"hello" * 1000)
    drafts, rejected = read(Tars(tuple(str(tmp_path / name) for name in ("cut.tar", "no.tar", "odd.tar"))))
    assert {entry.reason for entry in rejected} >= {"not_a_tar", "path_traversal", "truncated_tar"}
    assert {draft.origin for draft in drafts} >= {"odd.tar/a", "odd.tar/c"}


def test_a_csv_of_captions_is_read_as_python_reads_it(tmp_path):
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
