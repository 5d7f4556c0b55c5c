"""Grounding and scene text: annotation files against samples written by hand, and what is rejected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.domains import build_sample
from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Draft
from data_pipeline.inputs.grounding.boxed_captions import Grounding
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.inputs.ocr.scene_text import SceneText, Word, joined, reading_order
from data_pipeline.media.boxes import to_pixels, written_boxes
from tests.data_pipeline.inputs.reading import read
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

WIDTH, HEIGHT = 500, 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cat.jpg").write_bytes(encoded(pattern(HEIGHT, WIDTH)))
    return tmp_path


def write_lines(folder: Path, *records: Any) -> str:
    path = folder / "given.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return str(path)


def test_boxes_follow_their_phrases(folder: Path) -> None:
    cat, mat = [50, 20, 100, 80], [0, 150, 500, 200]
    caption = "A cat, a cat and a mat."
    path = write_lines(
        folder,
        {"image": "cat.jpg", "caption": caption, "phrases": [{"start": 0, "end": 5, "boxes": [cat]}]},
        {
            "image": "cat.jpg",
            "caption": caption,
            "phrases": [
                {"text": "a mat", "boxes": [mat]},
                {"text": "cat", "boxes": [cat]},
                {"text": "cat", "boxes": [cat, mat]},
            ],
        },
        {
            "image": "cat.jpg",
            "caption": "猫が眠る。",
            "box_format": "normalised",
            "phrases": [{"start": 0, "end": 1, "boxes": [[0.1, 0.1, 0.2, 0.4]]}],
        },
    )
    drafts, rejected = read(Grounding((path,)))
    assert not rejected
    assert [draft.record["text"] for draft in drafts] == [
        "<image>A cat [[100,100,200,400]], a cat and a mat.",
        "<image>A cat [[100,100,200,400]], a cat [[100,100,200,400],[0,750,999,999]] and a mat [[0,750,999,999]].",
        "<image>猫 [[100,100,200,400]]が眠る。",
    ]
    assert [draft.origin for draft in drafts] == ["given.jsonl:1", "given.jsonl:2", "given.jsonl:3"]
    for draft in drafts:
        assert build_sample(draft.record, images=1, videos=0).domain == "grounding"
        assert draft.images[0].data == (folder / "cat.jpg").read_bytes()


def test_bad_box_is_rejected_and_the_rest_of_the_sample_kept(folder: Path) -> None:
    good, outside, empty = [0, 0, 100, 100], [0, 0, 900, 100], [5, 5, 5, 9]
    record = {"image": "cat.jpg", "caption": "A cat"}
    path = write_lines(
        folder,
        {**record, "phrases": [{"text": "cat", "boxes": [outside, good, empty]}, {"text": "dog", "boxes": [good]}]},
        {**record, "phrases": [{"text": "cat", "boxes": [outside]}]},
        {**record, "phrases": [{"start": 2, "end": 99, "boxes": [good]}, 5, {"text": "cat"}]},
        {"image": "missing.jpg", "caption": "x", "phrases": []},
        {"image": "../cat.jpg", "caption": "x", "phrases": []},
        "{not json",
        "[1]",
        {"image": "cat.jpg"},
        {**record, "phrases": [], "box_format": "polar"},
        {"image": "given.jsonl", "caption": "x", "phrases": []},
    )
    drafts, rejected = read(Grounding((path,)))
    assert [draft.record["text"] for draft in drafts] == ["<image>A cat [[0,0,200,500]]"]
    assert Counter(sample.reason for sample in rejected) == {
        "bad_box": 4,
        "bad_phrase": 3,
        "no_boxes": 2,
        "missing_file": 1,
        "outside_folder": 1,
        "bad_record": 4,
        "unknown_extension": 1,
    }
    assert rejected[0].origin == "given.jsonl:1 phrase 0 box 0"


def test_coco_instances_become_one_line_per_category(folder: Path) -> None:
    content = {
        "images": [
            {"id": 7, "file_name": "cat.jpg"},
            {"id": 8, "file_name": "cat.jpg"},
            {"id": 9, "file_name": "no.jpg"},
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [50, 20, 50, 60]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 500, 200]},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [100, 100, 50, 50.5]},
            {"id": 4, "image_id": 7, "category_id": 2, "bbox": [0, 0, 50, 50], "iscrowd": 1},
            {"id": 5, "image_id": 7, "category_id": 99, "bbox": [0, 0, 50, 50]},
            {"id": 6, "image_id": 8, "category_id": 1, "bbox": [0, 0, 0, 50]},
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    drafts, rejected = read(Grounding((str(folder / "instances.json"),)))
    assert [draft.record["text"] for draft in drafts] == [
        "<image>cat [[100,100,200,400],[200,500,300,752]]\ndog [[0,0,999,999]]"
    ]
    assert [sample.reason for sample in rejected] == ["bad_phrase", "bad_box", "no_boxes", "missing_file"]
    (folder / "broken.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        Grounding((str(folder / "broken.json"),)).units()


def test_coco_image_of_another_size_than_the_annotated_one_is_rejected(folder: Path) -> None:
    size = {"width": WIDTH, "height": HEIGHT}
    content = {
        "images": [{"id": 1, "file_name": "cat.jpg", **size}, {"id": 2, "file_name": "cat.jpg", **size, "width": 1000}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": image, "category_id": 1, "bbox": [0, 0, 50, 50]} for image in (1, 2)],
    }
    (folder / "a.json").write_text(json.dumps(content))
    drafts, [rejected] = read(Grounding((str(folder / "a.json"),)))
    assert len(drafts) == 1
    assert rejected.reason == "size_mismatch"
    assert rejected.detail.startswith("the annotation is of an image of 1000x")


def test_only_kinds_with_the_option_advise_to_allow_files_outside(folder: Path) -> None:
    (folder / "in").mkdir()
    record = {"image": "../cat.jpg", "images": ["../cat.jpg"], "caption": "A cat", "phrases": [], "text": "A cat"}
    path = write_lines(folder / "in", record)
    for kind, advised in (("grounding", False), ("jsonl", True)):
        [(_, given)] = open_inputs([path], kind)
        _, [rejected] = read(given)
        assert rejected.reason == "outside_folder"
        assert ("--set allow_outside=true" in rejected.detail) == advised


def test_placeholder_in_a_caption_or_category_is_escaped(folder: Path) -> None:
    phrases = [{"text": "cat", "boxes": [[0, 0, 50, 50]]}]
    record = {"image": "cat.jpg", "caption": "A cat <image> sleeps. <video>", "phrases": phrases}
    (folder / "a.jsonl").write_text(json.dumps(record))
    coco = {
        "images": [{"id": 1, "file_name": "cat.jpg"}],
        "categories": [{"id": 1, "name": "<image>"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}],
    }
    (folder / "a.json").write_text(json.dumps(coco))
    drafts, _ = read(Grounding((str(folder / "a.jsonl"), str(folder / "a.json"))))
    texts = [draft.record["text"] for draft in drafts]
    assert texts == [
        "<image>A cat [[0,0,100,250]] < image > sleeps. < video >",
        "<image>< image > [[0,0,100,250]]",
    ]


def test_coco_id_that_is_no_number_or_text_is_refused(folder: Path) -> None:
    coco = {"images": [{"id": 1}], "categories": [{"id": [2], "name": "cat"}], "annotations": []}
    (folder / "a.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match='an id in "categories" is neither a number nor a text'):
        Grounding((str(folder / "a.json"),)).units()


def test_units_end_at_line_ends(folder: Path) -> None:
    record = {"image": "cat.jpg", "phrases": [{"start": 0, "end": 3, "boxes": [[0, 0, 9, 9]]}]}
    path = write_lines(folder, *({**record, "caption": f"{number:03d}"} for number in range(520)))
    given = Grounding((path,))
    assert len(given.units()) == 3
    drafts = [draft for unit in given.units() for draft in given.read(unit) if isinstance(draft, Draft)]
    assert ["".join(draft.record["text"].split(" [[0,0,18,45]]")) for draft in drafts] == [
        f"<image>{number:03d}" for number in range(520)
    ]
    assert [draft.origin for draft in drafts] == [f"given.jsonl:{number}" for number in range(1, 521)]


# --- scene text -------------------------------------------------------------------------------------------------------


def test_words_are_joined_in_reading_order() -> None:
    def word(text: str, x: float, y: float, height: float = 20) -> Word:
        return Word(text, (x, y, x + 50, y + height))

    shuffled = [
        word("world", 80, 3),
        word("second", 0, 42),
        word("Hello", 0, 0),
        word("line", 70, 38),
        word("!", 140, 8),
    ]
    assert [joined(line) for line in reading_order(shuffled)] == ["Hello world !", "second line"]
    assert [joined(line) for line in reading_order([word("中文", 0, 0), word("字", 60, 2), word("ok", 120, 0)])] == [
        "中文字 ok"
    ]
    assert [joined(line) for line in reading_order([word("עולם", 0, 0), word("שלום", 60, 0)])] == ["שלום עולם"]


def test_scene_text_is_read_from_json_lines_and_icdar_files(folder: Path) -> None:
    words = [
        {"text": "STOP", "box": [100, 20, 150, 40]},
        {"text": "Main St", "polygon": [[50, 100], [120, 90], [121, 110], [51, 120]]},
        {"text": "###", "box": [0, 0, 5, 5]},
        {"text": "gone", "box": [600, 0, 700, 5]},
        {"text": "odd", "polygon": [[1, 2], [3, "4"], [5, 6]]},
        7,
    ]
    path = write_lines(
        folder, {"image": "cat.jpg", "words": words}, {"image": "cat.jpg", "words": [words[2]]}, {"image": "cat.jpg"}
    )
    drafts, rejected = read(SceneText((path,)))
    assert [draft.record for draft in drafts] == [{"domain": "ocr", "text": "STOP\nMain St"}]
    assert [sample.reason for sample in rejected] == ["bad_box", "bad_box", "bad_record", "no_text", "bad_record"]

    (folder / "gt_cat.txt").write_bytes(
        b"\xef\xbb\xbf100,20,150,20,150,40,100,40,STOP\r\n50,100,120,90,121,110,51,120,Main St\r\n"
        b"0,0,5,0,5,5,0,5,###\r\nnot a word\r\n300,20,350,20,350,40,300,40,a, b\r\n"
    )
    (folder / "notes.txt").write_text("no image has this name")
    drafts, rejected = read(SceneText((str(folder),), form="boxes"))
    assert [draft.record["text"] for draft in drafts] == [
        "STOP [[200,100,300,200]]\na, b [[600,100,700,200]]\nMain St [[100,450,242,600]]"
    ]
    assert [sample.reason for sample in rejected] == ["bad_record"]
    assert build_sample(drafts[0].record, images=1, videos=0).domain == "ocr"


def test_boxes_refer_to_the_upright_image(folder: Path) -> None:
    """A photo taken with a turned camera is stored sideways, shown upright, and annotated as it is shown."""
    shown = np.zeros((300, 100, 3), np.uint8)
    shown[200:250, 10:60] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise when shown
    Image.fromarray(np.rot90(shown).copy()).save(folder / "turned.jpg", exif=exif, quality=95)
    path = write_lines(folder, {"image": "turned.jpg", "words": [{"text": "x", "box": [10, 200, 60, 250]}]})
    drafts, rejected = read(SceneText((path,), form="boxes"))
    assert not rejected
    ((_, box),) = written_boxes(drafts[0].record["text"])
    assert to_pixels(box, 100, 300) == pytest.approx((10, 200, 60, 250), abs=0.15)


def test_kinds_are_opened_by_name_with_their_options(folder: Path) -> None:
    path = write_lines(folder, {"image": "cat.jpg", "words": [{"text": "a", "box": [0, 0, 9, 9]}]})
    ((kind, given),) = open_inputs([path], "scene_text", ["form=boxes"])
    assert (kind, given) == ("scene_text", SceneText((path,), form="boxes"))
    ((_, given),) = open_inputs([path], "grounding", ["box_format=xywh"])
    assert given == Grounding((path,), box_format="xywh")
    with pytest.raises(DataError, match="xyxy, xywh, normalised"):
        open_inputs([path], "grounding", ["box_format=wxyz"])
