"""COCO annotations: the instances or the captions of images, in one JSON file.

Instances (annotations with `bbox` and `category_id`) become one line per category, in the domain `grounding`:

    <image>dog [[101,80,540,910],[700,12,803,77]]
    cat [[5,100,52,180]]

Captions (annotations with `caption`) become samples of the domain `image_text`. Objects365, LVIS and the exports of
annotation tools have the same form.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, NotRead, Rejected, Unit
from data_pipeline.inputs.flow import escape_placeholders
from data_pipeline.inputs.records.annotations import (
    IMAGE_BYTES,
    LINES_PER_UNIT,
    NAMES_CHECKED,
    AnnotatedImage,
    check_folder,
    load_json,
    read_image,
)
from data_pipeline.inputs.records.record_fields import Captions, choose_captions
from data_pipeline.media.boxes import BoxFormat, Thousandths, write_boxes

_LISTS = {"images": ("id",), "categories": ("id",), "annotations": ("image_id", "category_id")}  # list -> its ids
_KEYS = {
    "image": {"id", "file_name", "width", "height"},
    "annotation": {"id", "image_id", "category_id", "bbox", "iscrowd", "caption"},
}


@dataclass(frozen=True)
class Coco:
    """Content of a file of COCO annotations."""

    images: list[dict[str, Any]]  # in the order of the file
    names: dict[Any, Any]  # id of a category -> its name
    annotations: dict[int, list[dict[str, Any]]]  # position in `images` -> the annotations of that image
    unlisted: int  # annotations of images that are not listed
    other: list[str]  # other keys of the file


def coco_units(path: str, images: str) -> list[Unit]:
    """Return units of LINES_PER_UNIT images.

    Args:
        path: The file.
        images: The folder of the images; empty: the folder of the file.

    Raises:
        DataError: The file holds no COCO annotations, or its images lie in another folder.
    """
    load_coco.cache_clear()  # the file may have changed
    coco = load_coco(path)
    check_folder(path, images, [name for entry in coco.images[:NAMES_CHECKED] for name in _image_names(entry)])
    if not (count := len(coco.images)):
        raise DataError(f'{path}: its list "images" is empty: give a file whose annotations have images')
    return [
        Unit(path, start, min(start + LINES_PER_UNIT, count), bytes=IMAGE_BYTES * min(LINES_PER_UNIT, count - start))
        for start in range(0, count, LINES_PER_UNIT)
    ]


def count_coco(unit: Unit) -> Mapping[str, int]:
    """Count the images of a unit, and their annotations. Those of no image belong to the first unit."""
    coco = load_coco(unit.path)
    annotations = sum(len(coco.annotations.get(number, ())) for number in range(unit.start, unit.stop))
    return {"images": unit.stop - unit.start, "annotations": annotations + (coco.unlisted if unit.start == 0 else 0)}


def read_coco(
    unit: Unit, folder: Path, captions: Captions, box_format: BoxFormat
) -> Iterator[Draft | Rejected | NotRead]:
    """Yield the samples of a unit's images. Annotations that cannot be used are yielded as Rejected, one by one."""
    coco = load_coco(unit.path)
    if unit.start == 0:
        yield from (NotRead(f"key {key} of the file") for key in coco.other)
        if coco.unlisted:
            yield NotRead("annotation: its image is not listed", coco.unlisted, {"annotations": coco.unlisted})
    for number in range(unit.start, unit.stop):
        entry, annotations = coco.images[number], coco.annotations.get(number, [])
        origin = f"{Path(unit.path).name}:{_image_names(entry)[0]}"
        if any("caption" in annotation for annotation in annotations):
            yield from _captions(origin, entry, annotations, folder, captions)
        else:
            yield from _instances(origin, entry, annotations, coco, folder, box_format)


def _instances(
    origin: str,
    entry: dict[str, Any],
    annotations: list[dict[str, Any]],
    coco: Coco,
    folder: Path,
    box_format: BoxFormat,
) -> Iterator[Draft | Rejected | NotRead]:
    """Yield the sample of an image with boxes. Regions marked `iscrowd` are not single objects: they are not read."""
    single = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    if crowds := len(annotations) - len(single):
        yield NotRead("annotation: iscrowd", crowds, {"annotations": crowds})
    left = len(single)
    try:
        image = read_image(_image_name(entry, folder), folder, entry)
        objects: dict[str, list[Thousandths]] = {}
        for annotation in single:
            try:
                name, box = _object(annotation, image, coco, box_format)
                objects.setdefault(name, []).append(box)
            except BadSample as error:
                left -= 1
                where = f"{origin} annotation {annotation.get('id')}"
                yield Rejected(where, error.reason, error.detail, {"annotations": 1})
        if not objects:
            raise BadSample("no_boxes", "no annotation of the image has a valid box")
    except BadSample as error:
        yield Rejected(origin, error.reason, error.detail, {"images": 1, "annotations": left})
        return
    text = "\n".join(f"{escape_placeholders(name)} {write_boxes(boxes)}" for name, boxes in objects.items())
    record = {"domain": "grounding", "text": f"<image>{text}"}
    items = {"images": 1, "annotations": left}
    yield Draft(record, [image.media], origin=origin, items=items, not_read=_unread_keys(entry, single))


def _object(
    annotation: dict[str, Any], image: AnnotatedImage, coco: Coco, box_format: BoxFormat
) -> tuple[str, Thousandths]:
    name = coco.names.get(annotation.get("category_id"))
    if not isinstance(name, str) or not name:
        raise BadSample("bad_phrase", f"no category has the id {annotation.get('category_id')!r}")
    values = annotation.get("bbox")
    try:
        return name, image.thousandths(image.read_box(values, box_format))
    except BadSample as error:
        raise BadSample(error.reason, f"{str(values)[:80]} ({box_format}), in pixels {error.detail}") from error


def _captions(
    origin: str, entry: dict[str, Any], annotations: list[dict[str, Any]], folder: Path, which: Captions
) -> Iterator[Draft | Rejected | NotRead]:
    """Yield one sample per chosen caption of an image."""
    texts = [annotation.get("caption") for annotation in annotations]
    good = [text for text in texts if isinstance(text, str) and text.strip()]
    try:
        image = read_image(_image_name(entry, folder), folder, {})
        if any("caption" in annotation and annotation.get("bbox") for annotation in annotations):
            raise BadSample("bad_record", 'captions with a "bbox": write captions of boxes as records with "phrases"')
        if not good:
            raise BadSample("no_caption", "every caption of the image is empty")
    except BadSample as error:
        yield Rejected(origin, error.reason, error.detail, {"images": 1, "annotations": len(texts)})
        return
    if bad := len(texts) - len(good):
        yield Rejected(origin, "no_caption", f"{bad} captions of the image are not texts", {"annotations": bad})
    chosen = choose_captions(good, which, origin)
    if rest := len(good) - len(chosen):
        yield NotRead("caption not chosen", rest, {"annotations": rest})
    unread = _unread_keys(entry, annotations)
    for number, text in enumerate(chosen):
        record = {"domain": "image_text", "text": text.strip()}
        draft = Draft(record, [image.media], origin=origin, items={"annotations": 1})
        last = number == len(chosen) - 1
        yield replace(draft, items={"images": 1, "annotations": 1}, not_read=unread) if last else draft


def _image_names(entry: dict[str, Any]) -> list[Any]:
    """Return the paths at which an image may be. LVIS gives its URL alone: .../train2017/000000000009.jpg."""
    url = entry.get("coco_url")
    if entry.get("file_name") is not None or not isinstance(url, str):
        return [entry.get("file_name")]
    return ["/".join(url.rsplit("/", 2)[-2:]), url.rpartition("/")[2]]


def _image_name(entry: dict[str, Any], folder: Path) -> Any:
    """Return the path of an image: of those that it may have, the first that exists."""
    names = _image_names(entry)
    return next((name for name in names if isinstance(name, str) and os.path.isfile(folder / name)), names[0])


def _unread_keys(entry: dict[str, Any], annotations: list[dict[str, Any]]) -> Counter[str]:
    read = _KEYS["image"] if entry.get("file_name") is not None else _KEYS["image"] | {"coco_url"}
    unread = Counter(f"image key {key}" for key in entry.keys() - read)
    for annotation in annotations:
        unread.update(f"annotation key {key}" for key in annotation.keys() - _KEYS["annotation"])
    return unread


@lru_cache(maxsize=1)
def load_coco(path: str) -> Coco:
    """Read a file of COCO annotations.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no COCO annotations: give one, or a list of records, or JSON lines")
    lists = {}
    for key, ids in _LISTS.items():
        listed = content.get(key, [] if key == "categories" else None)
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise DataError(
                f'{path} has no list "{key}": give COCO annotations, or JSON lines in a file ending in .jsonl'
            )
        if odd := [entry for entry in listed if any(isinstance(entry.get(name), dict | list) for name in ids)]:
            raise DataError(f'{path}: an id in "{key}" is neither a number nor a text: fix {str(odd[0])[:120]}')
        lists[key] = listed
    positions: dict[Any, int] = {}
    for number, image in enumerate(lists["images"]):
        if positions.setdefault(image.get("id"), number) != number:
            raise DataError(f"{path}: two images have the id {image.get('id')!r}: give each an id of its own")
    annotations: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    unlisted = 0
    for annotation in lists["annotations"]:
        if (position := positions.get(annotation.get("image_id"))) is None:
            unlisted += 1
        else:
            annotations[position].append(annotation)
    names: dict[Any, Any] = {}
    for category in lists["categories"]:
        if names.setdefault(category.get("id"), category.get("name")) != category.get("name"):
            raise DataError(f"{path}: two categories have the id {category.get('id')!r}: give each an id of its own")
    return Coco(lists["images"], names, dict(annotations), unlisted, sorted(content.keys() - _LISTS.keys()))
