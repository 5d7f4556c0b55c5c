"""Public layouts of images with boxes: tiny files in their published form against texts written by hand."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Draft, NotRead, Rejected
from data_pipeline.inputs.grounding.boxed_captions import Grounding
from data_pipeline.inputs.grounding.marked_text import read_marks
from data_pipeline.inputs.ocr.scene_text import SceneText
from tests.data_pipeline.inputs.reading import opened, read
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

WIDTH, HEIGHT = 500, 200
BOX = "[[100,100,200,400]]"  # 50, 20 to 100, 80
OWN = {"image": "cat.jpg", "caption": "A cat", "phrases": [{"text": "cat", "boxes": [[50, 20, 100, 80]]}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cat.jpg").write_bytes(encoded(pattern(HEIGHT, WIDTH)))
    return tmp_path


def read_json(folder: Path, content: Any, name: str = "given.json", **options: Any) -> tuple[list[str], list[Rejected]]:
    drafts, rejected = read_drafts(folder, content, name, **options)
    return [draft.record["text"] for draft in drafts], rejected


def read_drafts(
    folder: Path, content: Any, name: str = "given.json", **options: Any
) -> tuple[list[Draft], list[Rejected]]:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read(Grounding((str(path),), **options))


SCREEN = {"img_filename": "cat.jpg", "bbox": [50, 20, 50, 60], "instruction": "close this window"}


def test_screenspot_boxes_are_corner_and_extent(folder: Path) -> None:
    entry = {**SCREEN, "data_type": "icon", "data_source": "windows"}
    drafts, rejected = read_drafts(folder, [entry, entry], "screenspot_desktop_v2.json")
    assert not rejected
    assert [draft.record["text"] for draft in drafts] == [f"<image>close this window {BOX}"] * 2
    assert drafts[1].origin == "screenspot_desktop_v2.json:2"
    assert drafts[0].not_read == {"key data_type": 1, "key data_source": 1}


def test_screenspot_pro_boxes_are_corners_of_the_size_given(folder: Path) -> None:
    entry = {**SCREEN, "bbox": [500, 200, 1000, 800], "img_size": [5000, 2000], "ui_type": "icon", "group": "CAD"}
    drafts, rejected = read_drafts(folder, [entry])
    assert not rejected
    assert drafts[0].record["text"] == f"<image>close this window {BOX}"
    assert drafts[0].not_read == {"key ui_type": 1, "key group": 1}


def test_box_of_unknown_format_is_asked_for(folder: Path) -> None:
    texts, rejected = read_json(folder, [SCREEN])
    assert not texts
    assert "--set box_format= one of xyxy, xywh" in rejected[0].detail
    assert read_json(folder, [SCREEN], box_format="xywh") == ([f"<image>close this window {BOX}"], [])


def test_visual_genome_regions_and_objects_are_read(folder: Path) -> None:
    (folder / "VG_100K_2").mkdir()
    (folder / "cat.jpg").rename(folder / "VG_100K_2" / "1.jpg")
    region = {"region_id": 1382, "image_id": 1, "x": 50, "y": 20, "width": 50, "height": 60}
    regions = [{**region, "phrase": "the cat is  green"}, {**region, "phrase": ""}, {**region, "phrase": "x", "y": 900}]
    texts, rejected = read_json(folder, [{"id": 1, "regions": regions}], "region_descriptions.json")
    assert texts == [f"<image>the cat is green {BOX}"]
    assert [entry.reason for entry in rejected] == ["bad_phrase", "bad_box"]

    entry = {"synsets": ["cat.n.01"], "object_id": 3, "merged_object_ids": [], "x": 50, "y": 20, "w": 50, "h": 60}
    objects = [{**entry, "names": ["cat", "kitten"]}, {**entry, "names": ["<image>"]}, {**entry, "names": ["cat"]}]
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    drafts, rejected = read_drafts(folder, [{"image_id": 1, "objects": objects, "image_url": url}], "objects.json")
    assert not rejected
    assert drafts[0].record["text"] == f"<image>cat {BOX[:-1]},{BOX[1:]}\n< image > {BOX}"
    assert drafts[0].not_read == {
        "object key synsets": 3,
        "object key object_id": 3,
        "object key merged_object_ids": 3,
        "object: another name of it": 1,
    }
    _, rejected = read_json(folder, [{"image_id": 1, "objects": objects}], box_format="xyxy")
    assert "remove box_format=xyxy" in rejected[0].detail


def test_grit_asks_which_phrases_are_read(folder: Path) -> None:
    box = [0.1, 0.1, 0.2, 0.4]
    record = {
        "key": "000373938",
        "image": "cat.jpg",
        "caption": "a cat with a paper cover",
        "width": 500,
        "height": 200,
        "original_width": 1000,
        "original_height": 400,
        "noun_chunks": [[0.0, 5.0, *box, 0.79], [0, 5, *box, 0.7], [11, 24, *box, 0.8]],
        "ref_exps": [[0, 24, *box, 0.79]],
    }
    texts, rejected = read_json(folder, record, "a.jsonl")
    assert not texts
    assert "--set spans=noun_chunks or spans=ref_exps" in rejected[0].detail
    texts, _ = read_json(folder, record, "a.jsonl", spans="noun_chunks")
    assert texts == [f"<image>a cat {BOX[:-1]},{BOX[1:]} with a paper cover {BOX}"]
    drafts, _ = read_drafts(folder, record, "a.jsonl", spans="ref_exps")
    assert drafts[0].record["text"] == f"<image>a cat with a paper cover {BOX}"
    assert drafts[0].not_read == {
        "key key": 1,
        "key width": 1,
        "key height": 1,
        "key noun_chunks": 1,
        "phrase score": 1,
    }
    texts, _ = read_json(folder, {**record, "noun_chunks": []}, "a.jsonl")
    assert texts == [f"<image>a cat with a paper cover {BOX}"]
    _, rejected = read_json(folder, {**record, "original_height": 1000}, "a.jsonl", spans="ref_exps")
    assert [entry.reason for entry in rejected] == ["size_mismatch"]


@pytest.mark.parametrize(
    "marked",
    [
        "<ref>The cat</ref><box>(100,100),(200,400)</box> sleeps.",
        "Image 1: <img>cat.jpg</img>\n<ref>The cat</ref><box>(100,100),(200,400)</box> sleeps.",
        "<image>\n<ref>The cat</ref><box>[[100, 100, 200, 400]]</box> sleeps.",
        "<|object_ref_start|>The cat<|object_ref_end|><|box_start|>(100,100),(200,400)<|box_end|> sleeps.",
    ],
)
def test_marked_text_becomes_a_caption_with_boxes(folder: Path, marked: str) -> None:
    expected = ["<image>The cat [[100,100,200,400]] sleeps."]
    assert read_json(folder, {"image": "cat.jpg", "caption": marked}, "a.jsonl") == (expected, [])


def test_marks_that_do_not_pair_are_rejected(folder: Path) -> None:
    lines = [
        {"image": "cat.jpg", "text": "A cat <box>(1,2),(3,4)</box>"},
        {"image": "cat.jpg", "text": "<ref>A cat<box>(1,2),(3,4)</box>"},
        {"image": "cat.jpg", "text": "<ref>A cat</ref><box>(1,2),(300)</box>"},
    ]
    texts, rejected = read_json(folder, lines)
    assert not texts
    assert [entry.reason for entry in rejected] == ["bad_phrase", "bad_phrase", "bad_box", "no_boxes"]
    assert read_marks("<ref>a</ref> b <ref>c</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>") == (
        "a b c",
        [{"start": 4, "end": 5, "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}],
    )


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        ({"image": "cat.jpg", "conversations": []}, "--kind jsonl"),
        ({"image_id": 1, "qas": []}, "region_descriptions.json and objects.json are read"),
        ({"shapes": [], "imagePath": "cat.jpg"}, "COCO"),
        ({"image": "cat.jpg", "label": "cat"}, "its keys: image, label"),
    ],
)
def test_record_of_another_layout_is_rejected_by_name(folder: Path, record: dict[str, Any], advice: str) -> None:
    texts, rejected = read_json(folder, [record])
    assert not texts
    assert advice in rejected[0].detail


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([OWN, OWN])),
        ("a.jsonl", json.dumps([OWN, OWN], indent=1)),
        ("a.jsonl", json.dumps([OWN, OWN])),
        ("a.json", f"{json.dumps(OWN)}\n{json.dumps(OWN)}\n"),
        ("a.json", f"\ufeff{json.dumps(OWN)}\r\n\r\n{json.dumps(OWN)}"),
    ],
)
def test_lists_and_lines_are_told_by_content(folder: Path, name: str, content: str) -> None:
    assert read_json(folder, content, name) == ([f"<image>A cat {BOX}"] * 2, [])
    words = json.loads(json.dumps([{"image": "cat.jpg", "words": [{"text": "STOP", "box": [50, 20, 100, 80]}]}]))
    (folder / "words.json").write_text(json.dumps(words))
    assert read(SceneText((str(folder / "words.json"),)))[0][0].record["text"] == "STOP"


@pytest.mark.parametrize(
    "size",
    [
        {"image_width": 1000, "image_height": 400},
        {"img_w": 1000, "img_h": 400},
        {"original_width": 1000, "original_height": 400},
        {"w": 1000, "h": 400},
        {"size": [1000, 400]},
        {"image_size": {"width": 1000, "height": 400}},
        {"width": 1000, "height": 400, "original_width": 99, "original_height": 3},
    ],
)
def test_size_of_the_annotated_image_is_found_under_its_names(folder: Path, size: dict[str, Any]) -> None:
    phrases = [{"text": "cat", "boxes": [[100, 40, 200, 160]]}]
    drafts, rejected = read_drafts(folder, {**OWN, "phrases": phrases, **size}, "a.jsonl")
    assert (drafts[0].record["text"], rejected) == (f"<image>A cat {BOX}", [])
    assert set(drafts[0].not_read) == ({"key original_width", "key original_height"} if len(size) > 2 else set())
    words = {"image": "cat.jpg", "words": [{"text": "STOP", "box": [100, 40, 200, 160]}], **size}
    (folder / "words.jsonl").write_text(json.dumps(words))
    words_drafts, _ = read(SceneText((str(folder / "words.jsonl"),), form="boxes"))
    assert words_drafts[0].record["text"] == f"STOP {BOX}"


@pytest.mark.parametrize(
    "size",
    [
        {"image_width": 500, "image_height": 200, "img_size": [1000, 400]},
        {"size": [200, 500, 3]},
        {"image_size": "500x200"},
        {"img_w": "500", "img_h": "200"},
        {"image_width": 500},
    ],
)
def test_size_that_is_not_clear_is_a_mismatch(folder: Path, size: dict[str, Any]) -> None:
    texts, rejected = read_json(folder, {**OWN, **size}, "a.jsonl")
    assert not texts
    assert [entry.reason for entry in rejected] == ["size_mismatch"]


@pytest.mark.parametrize(
    ("boxes", "given", "advice"),
    [
        ([0.1, 0.1, 0.2, 0.4], "xyxy", "box_format=normalised"),
        ([0, 0, 1, 1], "xywh", "box_format=normalised"),
        ([0.1, 0.1, 0.2, 0.4], "thousandths", "box_format=normalised"),
        ([100, 100, 200, 400], "xyxy", "box_format=thousandths"),
        ([50, 20, 50, 60], "xyxy", "box_format=xywh"),
        ([450, 20, 500, 60], "xywh", "box_format=xyxy"),
    ],
)
def test_box_of_another_format_is_rejected_by_its_name(
    folder: Path, boxes: Sequence[float], given: Any, advice: str
) -> None:
    record = {**OWN, "phrases": [{"text": "cat", "boxes": [boxes]}]}
    texts, rejected = read_json(folder, record, "a.jsonl", box_format=given)
    assert not texts
    assert [entry.reason for entry in rejected] == ["bad_box", "no_boxes"]
    assert advice in rejected[0].detail


def test_box_format_is_obeyed_by_coco_and_scene_text(folder: Path) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "cat.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0.1, 0.1, 0.2, 0.4]}],
    }
    assert read_json(folder, coco, box_format="normalised") == ([f"<image>cat {BOX}"], [])
    assert "box_format=normalised" in read_json(folder, coco)[1][0].detail
    words = [
        {"text": "STOP", "box": [0.1, 0.1, 0.2, 0.4]},
        {"text": "GO", "polygon": [[0.5, 0.1], [0.7, 0.1], [0.6, 0.4]]},
    ]
    (folder / "words.jsonl").write_text(json.dumps({"image": "cat.jpg", "words": words}))
    drafts, _ = read(SceneText((str(folder / "words.jsonl"),), form="boxes", box_format="normalised"))
    assert drafts[0].record["text"] == f"STOP {BOX}\nGO [[500,100,700,400]]"
    _, rejected = read(SceneText((str(folder / "words.jsonl"),)))
    assert [entry.reason for entry in rejected] == ["bad_box", "bad_box", "no_text"]


# --- tables and tars --------------------------------------------------------------------------------------------------


def write_table(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "val-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def test_refcoco_tables_with_images_are_read(folder: Path) -> None:
    row = {
        "question_id": "1",
        "image": {"bytes": (folder / "cat.jpg").read_bytes(), "path": "COCO_train2014_000000000001_0.jpg"},
        "question": "Please describe the region.",
        "answer": ["left cat", "cat", "left cat"],
        "segmentation": [1.0, 2.0],
        "bbox": [50.0, 20.0, 50.0, 60.0],
        "iscrowd": 0,
        "file_name": "COCO_train2014_000000000001.jpg",
    }
    path = write_table(folder, [row, row, {**row, "image": {"bytes": b"no image", "path": None}}])
    drafts, rejected = read(Grounding((path,)))
    assert [draft.record["text"] for draft in drafts] == [f"<image>left cat {BOX}\ncat {BOX}"] * 2
    assert drafts[0].images[0].data == (folder / "cat.jpg").read_bytes()
    names = ("question_id", "question", "segmentation", "iscrowd", "file_name")
    unread = {f"key {name}": 1 for name in names}
    assert drafts[0].not_read == {**unread, "expression: the same as another of its box": 1}
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("val-00000-of-00001.parquet:3", "unknown_extension")
    ]


def test_refcoco_tables_with_paths_are_read(folder: Path) -> None:
    (folder / "coco/train2014").mkdir(parents=True)
    (folder / "cat.jpg").rename(folder / "coco/train2014/1.jpg")
    row = {
        "sentences": [{"raw": "Left cat", "sent": "left cat", "sent_id": 1, "tokens": ["left", "cat"]}],
        "image_path": "coco/train2014/1.jpg",
        "bbox": [100.0, 40.0, 200.0, 160.0],
        "raw_image_info": json.dumps({"file_name": "1.jpg", "width": 1000, "height": 400}),
        "captions": ["Left cat"],
    }
    (folder / "tables").mkdir()
    path = write_table(folder / "tables", [row])
    drafts, rejected = read(Grounding((path,), images=str(folder)))
    assert not rejected
    assert [draft.record["text"] for draft in drafts] == [f"<image>Left cat {BOX}"]


def test_screenspot_tables_have_fractions(folder: Path) -> None:
    row = {
        "file_name": "mobile_1.png",
        "bbox": [0.1, 0.1, 0.2, 0.4],
        "instruction": "close",
        "data_type": "icon",
        "data_source": "ios",
        "image": {"bytes": (folder / "cat.jpg").read_bytes(), "path": "mobile_1.png"},
    }
    drafts, _ = read(Grounding((write_table(folder, [row]),)))
    assert [draft.record["text"] for draft in drafts] == [f"<image>close {BOX}"]


def test_grit_is_read_from_the_tars_of_img2dataset(folder: Path) -> None:
    record = {
        "caption": "a wire hanger",
        "noun_chunks": [[0, 13, 0.1, 0.1, 0.2, 0.4, 0.8]],
        "ref_exps": [[0, 13, 0.1, 0.1, 0.2, 0.4, 0.8]],
        "key": "000000000",
        "status": "success",
        "width": 500,
        "height": 200,
        "original_width": 1000,
        "original_height": 400,
    }
    members = {
        "000000000.jpg": (folder / "cat.jpg").read_bytes(),
        "000000000.json": json.dumps(record).encode(),
        "000000000.txt": b"a wire hanger",
        "000000001.json": json.dumps(record).encode(),
    }
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    drafts, rejected = read(Grounding((str(folder / "00000.tar"),), spans="noun_chunks"))
    assert [draft.record["text"] for draft in drafts] == [f"<image>a wire hanger {BOX}"]
    assert drafts[0].items == {"members": 3, "boxes": 1}
    assert set(drafts[0].not_read) == {
        "key key",
        "key status",
        "key width",
        "key height",
        "key ref_exps",
        "phrase score",
    }
    assert [entry.reason for entry in rejected] == ["missing_member"]


def test_images_in_another_folder_are_asked_for(folder: Path) -> None:
    (folder / "screenspotv2_image").mkdir()
    (folder / "cat.jpg").rename(folder / "screenspotv2_image" / "cat.jpg")
    (folder / "a.json").write_text(json.dumps([{**SCREEN, "data_type": "icon", "data_source": "windows"}]))
    (folder / "words.jsonl").write_text(json.dumps({"image": "cat.jpg", "words": []}))
    for given in (Grounding((str(folder / "a.json"),)), SceneText((str(folder / "words.jsonl"),))):
        with pytest.raises(DataError, match=f"--set images={folder / 'screenspotv2_image'}$"):
            given.units()
    drafts, _ = read(Grounding((str(folder / "a.json"),), images=str(folder / "screenspotv2_image")))
    assert [draft.record["text"] for draft in drafts] == [f"<image>close this window {BOX}"]


def test_words_in_one_object_are_refused(folder: Path) -> None:
    (folder / "words.json").write_text(json.dumps({"image": "cat.jpg", "words": []}, indent=1))
    with pytest.raises(DataError, match="is one object: write a list of records"):
        SceneText((str(folder / "words.json"),)).units()


def test_flickr30k_entities_join_phrases_and_boxes(folder: Path) -> None:
    root, images = folder / "Flickr30kEntities", folder / "flickr30k-images"
    for path in (root / "Sentences", root / "Annotations", images):
        path.mkdir(parents=True)
    (folder / "cat.jpg").rename(images / "36979.jpg")
    (root / "Sentences/36979.txt").write_text(
        "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] in [/EN#8/scene the yard] .\n"
        "[/EN#0/notvisual Someone] waits .\n"
    )
    box = "<bndbox><xmin>51</xmin><ymin>21</ymin><xmax>100</xmax><ymax>80</ymax></bndbox>"
    (root / "Annotations/36979.xml").write_text(
        "<annotation><filename>36979.jpg</filename>"
        "<size><width>500</width><height>200</height><depth>3</depth></size>"
        f"<object><name>1</name>{box}</object><object><name>1</name><name>2</name>{box}</object>"
        f"<object><name>8</name><scene>1</scene><nobndbox>0</nobndbox></object><object><name>9</name>{box}</object>"
        "</annotation>"
    )
    (root / "train.txt").write_text("36979\n")
    with pytest.raises(DataError, match=f"--set images={images}$"):
        opened(root, kind="grounding").units()
    given = opened(root, kind="grounding", settings=[f"images={images}"])
    drafts, rejected = read(given)
    assert [draft.record["text"] for draft in drafts] == [
        f"<image>Two young guys {BOX[:-1]},{BOX[1:]} with shaggy hair {BOX} in the yard ."
    ]
    assert [(entry.origin, entry.reason) for entry in rejected] == [("36979.txt:2", "no_boxes")]
    [unit] = given.units()
    not_read = {entry.name: entry.count for entry in given.read(unit) if isinstance(entry, NotRead)}
    assert not_read == {"file .txt": 1, "phrase without a box": 2, "box: no sentence names it": 1}
    (root / "Annotations/36979.xml").write_text("<annotation>")
    assert [entry.reason for entry in read(given)[1]] == ["bad_record"]


def test_folder_that_is_no_known_layout_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="give that folder"):
        opened(folder, kind="grounding").units()


@pytest.mark.parametrize("image", [{"image_path": "cat.jpg"}, {"images": ["cat.jpg"]}, {"file_name": "cat.jpg"}])
def test_image_is_found_under_its_names(folder: Path, image: dict[str, Any]) -> None:
    record = {key: value for key, value in OWN.items() if key != "image"} | image
    drafts, rejected = read_drafts(folder, record, "a.jsonl")
    assert (drafts[0].record["text"], rejected) == (f"<image>A cat {BOX}", [])
    assert not drafts[0].not_read
    (folder / "words.jsonl").write_text(json.dumps({"words": [{"text": "STOP", "box": [50, 20, 100, 80]}], **image}))
    drafts, rejected = read(SceneText((str(folder / "words.jsonl"),)))
    assert (drafts[0].record["text"], drafts[0].not_read, rejected) == ("STOP", {}, [])


def test_image_that_is_a_url_is_rejected_with_what_downloads_it(folder: Path) -> None:
    record = {"caption": "a cat", "url": "http://x/a.jpg", "noun_chunks": [[0, 5, 0.1, 0.1, 0.2, 0.4, 0.9]]}
    _, rejected = read(Grounding((write_table(folder, [record]),)))
    assert [(entry.reason, "img2dataset" in entry.detail) for entry in rejected] == [("remote_file", True)]


def test_icdar_2013_words_have_two_corners(folder: Path) -> None:
    (folder / "gt_cat.txt").write_text('50, 20, 100, 80, "a, b"\n250 20 300 80 "say "hi""\n1,2,3\n')
    drafts, rejected = read(SceneText((str(folder),), form="boxes"))
    assert [draft.record["text"] for draft in drafts] == [f'a, b {BOX}\nsay "hi" [[500,100,600,400]]']
    assert [entry.reason for entry in rejected] == ["bad_record"]


def test_odd_values_reject_one_record(folder: Path) -> None:
    phrase = {"start": 2, "end": 5, "boxes": [[50, 20, 100, 80]]}
    records = [
        OWN,
        {**OWN, "image": "x" * 5000},
        {**OWN, "phrases": [{**phrase, "text": "cat"}]},
        {**OWN, "phrases": [{**phrase, "text": "dog"}]},  # the offsets are of another caption
        {**OWN, "w": 10**400, "h": 1, "size": [1, 2]},
        {"image": "cat.jpg", "caption": "A cat", "noun_chunks": 5},
        {"image": "cat.jpg", "caption": "A cat", "noun_chunks": [[{}, 1, 0, 0, 1, 1]]},
    ]
    texts, rejected = read_json(folder, records)
    assert texts == [f"<image>A cat {BOX}"] * 2
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("given.json:2", "missing_file"),
        ("given.json:4 phrase 0", "bad_phrase"),
        ("given.json:4", "no_boxes"),
        ("given.json:5", "size_mismatch"),
        ("given.json:6", "bad_record"),
        ("given.json:7", "bad_record"),
    ]


def test_lists_are_read_in_ranges(folder: Path) -> None:
    path = folder / "given.json"
    path.write_text(json.dumps([OWN] * 600, indent=1))
    given = Grounding((str(path),))
    assert [given.given(unit) for unit in given.units()] == [{"records": count} for count in (256, 256, 88)]
    drafts, rejected = read(given)
    assert not rejected
    assert [draft.origin for draft in drafts] == [f"given.json:{number}" for number in range(1, 601)]


def test_bytes_that_are_no_image_are_counted(folder: Path) -> None:
    image = (folder / "cat.jpg").read_bytes()
    rows = [{**OWN, "image": image, "mask": b"no image"}, {**OWN, "image": b"no image", "mask": b""}]
    drafts, rejected = read(Grounding((write_table(folder, rows),)))
    assert [draft.not_read for draft in drafts] == [{"key mask": 1}]
    assert [entry.reason for entry in rejected] == ["unknown_extension"]


def test_tar_of_chats_is_rejected(folder: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in (("0.json", json.dumps({"domain": "chat", "messages": turns}).encode()),):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    drafts, rejected = read(Grounding((str(folder / "a.tar"),)))
    assert not drafts
    assert [entry.reason for entry in rejected] == ["bad_record"]


def test_scripts_of_icdar_mlt_are_no_part_of_words(folder: Path) -> None:
    (folder / "gt_cat.txt").write_text("10,20,50,20,50,40,10,40,Latin,A, b\n0,0,5,0,5,5,0,5,None,###\n")
    drafts, _ = read(SceneText((str(folder),)))
    assert [draft.record["text"] for draft in drafts] == ["A, b"]
    assert drafts[0].not_read == {"word key script": 2, "word: illegible": 1}


@pytest.mark.parametrize("kind", ["grounding", "scene_text", "clips"])
def test_annotations_in_utf16_are_refused_with_the_command_that_converts_them(folder: Path, kind: str) -> None:
    path = folder / "given.jsonl"
    path.write_text(json.dumps(OWN), encoding="utf-16")
    with pytest.raises(DataError, match=r"UTF-16 .*iconv -f UTF-16 -t UTF-8"):
        list(opened(path, kind=kind).units())
