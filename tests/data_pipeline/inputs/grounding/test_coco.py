"""COCO annotations: instances, captions, and what is not read of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import NotRead
from data_pipeline.inputs.grounding.boxed_captions import Grounding
from tests.data_pipeline.inputs.reading import JPEG, read

pytestmark = pytest.mark.fast

IMAGES = [{"id": 7, "file_name": "a.jpg", "width": 60, "height": 40, "license": 3}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    return tmp_path


def write(folder: Path, **content: Any) -> str:
    path = folder / "given.json"
    path.write_text(json.dumps({"images": IMAGES, **content}))
    return str(path)


@pytest.mark.parametrize(("captions", "texts"), [("all", ["one", "two"]), ("first", ["one"]), ("random", None)])
def test_captions_become_image_text(folder: Path, captions: Any, texts: list[str] | None) -> None:
    annotations = [{"id": n, "image_id": 7, "caption": text} for n, text in enumerate(("one ", "two", "", None))]
    drafts, rejected = read(Grounding((write(folder, annotations=annotations),), captions=captions))
    found = [draft.record["text"] for draft in drafts]
    assert found == texts if texts else len(found) == 1
    assert {draft.record["domain"] for draft in drafts} == {"image_text"}
    assert [entry.reason for entry in rejected] == ["no_caption"]
    assert drafts[-1].not_read == {"image key license": 1}


def test_what_is_not_read_is_named(folder: Path) -> None:
    box = {"bbox": [1, 1, 9, 9], "category_id": 1}
    annotations = [
        {"id": 1, "image_id": 7, **box, "segmentation": []},
        {"id": 2, "image_id": 7, **box, "iscrowd": 1},
        {"id": 3, "image_id": 8, **box},
        {"id": 4, "image_id": 7, "category_id": 1, "segmentation": [[1, 1, 2, 2, 3, 3]]},
    ]
    categories = [{"id": 1, "name": "cat"}]
    given = Grounding((write(folder, annotations=annotations, categories=categories, info={}),))
    drafts, rejected = read(given)
    assert drafts[0].not_read == {"image key license": 1, "annotation key segmentation": 2}
    assert [entry.reason for entry in rejected] == ["bad_box"]
    [unit] = given.units()
    assert given.given(unit) == {"images": 1, "annotations": 4}
    names = [entry.name for entry in given.read(unit) if isinstance(entry, NotRead)]
    assert names == ["key info of the file", "annotation: its image is not listed", "annotation: iscrowd"]


def test_images_of_another_folder_are_asked_for(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "a.jpg").rename(folder / "images" / "a.jpg")
    path = write(folder, annotations=[], categories=[])
    with pytest.raises(DataError, match=f"--set images={folder / 'images'}$"):
        Grounding((path,)).units()
    assert len(Grounding((path,), images=str(folder / "images")).units()) == 1


def test_two_images_with_one_id_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="two images have the id 7"):
        Grounding((write(folder, images=[*IMAGES, *IMAGES], annotations=[], categories=[]),)).units()


def test_images_of_lvis_are_named_by_their_urls(folder: Path) -> None:
    images = [{"id": 7, "coco_url": "http://images.cocodataset.org/train2017/a.jpg", "width": 60, "height": 40}]
    annotations = [{"image_id": 7, "category_id": 1, "bbox": [6, 4, 30, 20]}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    path = write(folder, **content)
    for _ in range(2):
        drafts, rejected = read(Grounding((path,)))
        assert not rejected
        assert [draft.record["text"] for draft in drafts] == ["<image>cat [[100,100,600,600]]"]
        assert not drafts[0].not_read
        (folder / "train2017").mkdir(exist_ok=True)
        if (folder / "a.jpg").exists():
            (folder / "a.jpg").rename(folder / "train2017" / "a.jpg")


def test_what_is_not_clear_is_refused(folder: Path) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]
    with pytest.raises(DataError, match="two categories have the id 1"):
        Grounding((write(folder, annotations=[], categories=categories),)).units()
    with pytest.raises(DataError, match='its list "images" is empty'):
        Grounding((write(folder, images=[], annotations=[]),)).units()
    both = [{"image_id": 7, "caption": "a cat", "bbox": [1, 1, 9, 9]}]
    drafts, rejected = read(Grounding((write(folder, annotations=both),)))
    assert not drafts
    assert [entry.reason for entry in rejected] == ["bad_record"]
