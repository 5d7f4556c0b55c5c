"""How public data sets write images with boxes: one entry of LAYOUTS for each, told by the keys of its records.

Every layout is converted to an `Annotation`: a caption with boxes of its phrases, or phrases alone, one per line.

    ScreenSpot      {"img_filename", "bbox": [x, y, w, h], "instruction", "data_type", "data_source"}
    ScreenSpot-Pro  the same with corners, "img_size": [w, h] and "ui_type"
    RefCOCO         {"question_id", "image", "answer": [expressions], "bbox": [x, y, w, h]} (lmms-lab),
                    {"sentences", "bbox": corners, "image_path", "raw_image_info"} (jxu124)
    Visual Genome   {"id", "regions": [{"phrase", "x", "y", "width", "height"}]},
                    {"image_id", "objects": [{"names", "x", "y", "w", "h"}]}
    GRIT            {"caption", "noun_chunks" and "ref_exps": [[start, end, x1, y1, x2, y2, score]]}, fractions
    marked text     {"caption": "<ref>A cat</ref><box>(101,80),(540,910)</box>"}, thousandths
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipeline.errors import BadSample
from data_pipeline.inputs.grounding.marked_text import is_marked, read_marks
from data_pipeline.inputs.records.annotations import find_image
from data_pipeline.media.boxes import BoxFormat

Spans = Literal["ask", "noun_chunks", "ref_exps"]

_TEXTS = ("caption", "text")


@dataclass(frozen=True)
class Annotation:
    """What a record says of an image."""

    images: tuple[Any, ...]  # its path, or the paths at which it may be
    caption: str | None  # None: the phrases have texts and become lines
    phrases: list[Any]  # {"start", "end" or "text", "boxes"}
    box_format: BoxFormat | None  # None: the user has to say it
    fixed: bool = False  # the boxes have no other format
    read: frozenset[str] = frozenset()  # keys of the record that were read
    size: Mapping[str, Any] = field(default_factory=dict)  # as the record, where it gives the size of the image
    unread: Counter[str] = field(default_factory=Counter)  # parts of its items that are not read, by name


@dataclass(frozen=True)
class Layout:
    """One way to write an image with boxes."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[dict[str, Any], Spans], Annotation]


def find_annotation(record: dict[str, Any], spans: Spans) -> Annotation:
    """Return what a record says, by the first layout that it has.

    Args:
        record: A line of a file, an entry of a list, a row of a table, or the JSON of a tar's sample.
        spans: Which phrases of GRIT are read.

    Raises:
        BadSample: It has no known layout, or lacks something.
    """
    for layout in LAYOUTS:
        if layout.matches(record):
            return layout.convert(record, spans)
    for key, fix in _ELSEWHERE.items():
        if key in record:
            raise BadSample("bad_record", f'"{key}" is not read here: {fix}')
    keys = ", ".join(sorted(record)[:12]) or "none"
    raise BadSample(
        "bad_record", f'no known layout of boxes (its keys: {keys}): a line needs a "caption" and a list of "phrases"'
    )


_ELSEWHERE = {
    "conversations": "give chats with --kind jsonl",
    "messages": "give chats with --kind jsonl",
    "qas": "Visual Genome's region_descriptions.json and objects.json are read",
    "relationships": "Visual Genome's region_descriptions.json and objects.json are read",
    "shapes": "export LabelMe's files as COCO annotations",
    "words": "use --kind scene_text",
}


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: all(key in record for key in keys)


def _own(record: dict[str, Any], spans: Spans) -> Annotation:
    caption, phrases = record.get("caption"), record.get("phrases")
    if not isinstance(caption, str) or not caption or not isinstance(phrases, list):
        raise BadSample("bad_record", 'a line needs a "caption" and a list of "phrases"')
    image, name = find_image(record)
    read = frozenset({name, "caption", "phrases"})
    return Annotation((image,), caption, phrases, "xyxy", read=read, size=record)


def _expressions(
    *, image: str, texts: str, box_format: BoxFormat | None
) -> Callable[[dict[str, Any], Spans], Annotation]:
    """Return the converter of records with one box and one or more expressions for it."""

    def convert(record: dict[str, Any], spans: Spans) -> Annotation:
        said = record[texts] if isinstance(record[texts], list) else [record[texts]]
        found = [entry.get("raw") or entry.get("sent") if isinstance(entry, dict) else entry for entry in said]
        phrases = [{"text": text, "boxes": [record["bbox"]]} for text in dict.fromkeys(map(_as_text, found))]
        read = {image, texts, "bbox"}
        size: Mapping[str, Any] = record
        if isinstance(record.get("raw_image_info"), str):
            size, read = _parsed(record["raw_image_info"]), read | {"raw_image_info"}
        unread = Counter({"expression: the same as another of its box": len(said) - len(phrases)})
        return Annotation((record[image],), None, phrases, box_format, read=frozenset(read), size=size, unread=+unread)

    return convert


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", f'"raw_image_info" is not JSON: {error}') from error
    return found if isinstance(found, dict) else {}


def _as_text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _visual_genome(
    key: str, names: tuple[str, ...], sides: tuple[str, str]
) -> Callable[[dict[str, Any], Spans], Annotation]:
    """Return the converter of Visual Genome's regions or objects. Boxes with one name become one line."""
    read_keys = {*names, "x", "y", *sides}

    def convert(record: dict[str, Any], spans: Spans) -> Annotation:
        if not isinstance(record[key], list):
            raise BadSample("bad_record", f'"{key}" is not a list')
        boxes: dict[str, list[Any]] = {}
        unread: Counter[str] = Counter()
        for entry in record[key]:
            if not isinstance(entry, dict):
                raise BadSample("bad_record", f'"{key}" holds something other than JSON objects')
            unread.update(f"{key.removesuffix('s')} key {name}" for name in entry.keys() - read_keys)
            said = next((entry[name] for name in names if entry.get(name)), "")
            if isinstance(said, list):
                unread["object: another name of it"] += len(said) - 1
                said = said[0]
            boxes.setdefault(_as_text(said), []).append([entry.get(name) for name in ("x", "y", *sides)])
        phrases = [{"text": text, "boxes": given} for text, given in boxes.items()]
        read = frozenset({key, "id", "image_id", "image_url", "url", "image"})
        return Annotation(
            _genome_paths(record), None, phrases, "xywh", fixed=True, read=read, size=record, unread=+unread
        )

    return convert


def _genome_paths(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the paths at which an image of Visual Genome may be: as its URL ends, or in one of its two folders."""
    if "image" in record:
        return (record["image"],)
    url = record.get("image_url") or record.get("url")
    named = ["/".join(url.rsplit("/", 2)[-2:])] if isinstance(url, str) else []
    number = record.get("image_id", record.get("id"))
    named += [f"{folder}{number}.jpg" for folder in ("VG_100K/", "VG_100K_2/", "")]
    return tuple(dict.fromkeys(named))


def _grit(record: dict[str, Any], spans: Spans) -> Annotation:
    """Convert a sample of GRIT. Noun chunks are parts of referring expressions: one of both is read."""
    given = [name for name in ("noun_chunks", "ref_exps") if record.get(name)]
    if len(given) > 1 and spans == "ask":
        raise BadSample("bad_record", "noun_chunks or ref_exps? Choose with --set spans=noun_chunks or spans=ref_exps")
    name = (given or ["noun_chunks"])[0] if spans == "ask" else spans
    chosen = record.get(name) or []
    if not isinstance(chosen, list):
        raise BadSample("bad_record", f'"{name}" is not a list')
    boxes: dict[tuple[Any, Any], list[Any]] = {}
    for entry in chosen:
        if not isinstance(entry, list) or len(entry) < 6 or not all(isinstance(at, (int, float)) for at in entry[:2]):
            raise BadSample("bad_record", f"{str(entry)[:80]} is not [start, end, x1, y1, x2, y2, score]")
        start, end = (int(at) if isinstance(at, float) and at.is_integer() else at for at in entry[:2])
        boxes.setdefault((start, end), []).append(entry[2:6])
    phrases = [{"start": start, "end": end, "boxes": found} for (start, end), found in boxes.items()]
    image, image_name = find_image(record)
    read = {"caption", image_name, name}
    size = {name: record[name] for name in ("original_width", "original_height") if record.get(name)}
    return Annotation(
        (image,),
        record["caption"] if isinstance(record["caption"], str) else "",
        phrases,
        "normalised",
        read=frozenset(read),
        size=size or record,
        unread=Counter({"phrase score": sum(len(entry) > 6 for entry in chosen)}),
    )


def _is_marked(record: Mapping[str, Any]) -> bool:
    return any(isinstance(record.get(key), str) and is_marked(record[key]) for key in _TEXTS)


def _marked(record: dict[str, Any], spans: Spans) -> Annotation:
    key = next(key for key in _TEXTS if isinstance(record.get(key), str) and is_marked(record[key]))
    caption, phrases = read_marks(record[key])
    image, name = find_image(record)
    read = frozenset({name, key})
    return Annotation((image,), caption, phrases, "thousandths", read=read, size=record)


_SCREEN = ("bbox", "instruction")

LAYOUTS = (
    Layout("captions with phrases", _has("phrases"), _own),
    Layout(
        "ScreenSpot-Pro",
        _has("img_filename", *_SCREEN, "img_size", "ui_type"),
        _expressions(image="img_filename", texts="instruction", box_format="xyxy"),
    ),
    Layout(
        "ScreenSpot, as tables",  # of rootsautomation and of HongxinLi
        _has("image", *_SCREEN, "data_type", "data_source"),
        _expressions(image="image", texts="instruction", box_format="normalised"),
    ),
    Layout(
        "ScreenSpot",
        lambda record: _has("img_filename", *_SCREEN, "data_type", "data_source")(record) and "img_size" not in record,
        _expressions(image="img_filename", texts="instruction", box_format="xywh"),
    ),
    Layout(
        "instructions with a box",
        _has("img_filename", *_SCREEN),
        _expressions(image="img_filename", texts="instruction", box_format=None),
    ),
    Layout(
        "instructions with a box of a named image",
        _has("image", *_SCREEN),
        _expressions(image="image", texts="instruction", box_format=None),
    ),
    Layout(
        "RefCOCO of lmms-lab",
        _has("question_id", "image", "answer", "bbox"),
        _expressions(image="image", texts="answer", box_format="xywh"),
    ),
    Layout(
        "RefCOCO of jxu124",
        _has("sentences", "bbox", "image_path", "raw_image_info"),
        _expressions(image="image_path", texts="sentences", box_format="xyxy"),
    ),
    Layout("Visual Genome, regions", _has("regions"), _visual_genome("regions", ("phrase",), ("width", "height"))),
    Layout(
        "Visual Genome, objects", _has("objects", "image_id"), _visual_genome("objects", ("names", "name"), ("w", "h"))
    ),
    Layout("GRIT", lambda record: "caption" in record and ("noun_chunks" in record or "ref_exps" in record), _grit),
    Layout("marked text", _is_marked, _marked),
)
