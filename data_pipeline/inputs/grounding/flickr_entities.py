"""Flickr30k Entities: a folder with five captions of each image in Sentences/ID.txt, and boxes in Annotations/ID.xml.

    [/EN#1/people Two young guys] look at [/EN#3/bodyparts their hands] .

    <object><name>1</name><bndbox><xmin>159</xmin><ymin>125</ymin><xmax>219</xmax><ymax>335</ymax></bndbox></object>

The number joins a phrase with its boxes. Pixels are counted from 1, and a box contains its last ones. The images are
published apart, as ID.jpg.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import NotRead, Rejected, Unit
from data_pipeline.inputs.grounding.found import Found
from data_pipeline.inputs.media import read_whole
from data_pipeline.inputs.names import count_by_suffix, files_below
from data_pipeline.inputs.records.annotations import IMAGE_BYTES

SENTENCES, ANNOTATIONS = "Sentences", "Annotations"
_PHRASE = re.compile(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def folder_units(folder: str) -> list[Unit]:
    """Return one unit per file of sentences. The first one counts the folder's other files, in `extra["other"]`.

    Raises:
        DataError: The folder is no copy of Flickr30k Entities.
    """
    files = sorted(files_below(Path(folder)))
    sentences = [path for path in files if path.parent.name == SENTENCES and path.suffix == ".txt"]
    if not sentences:
        raise DataError(
            f"{folder} is no folder of Flickr30k Entities ({SENTENCES}, {ANNOTATIONS}): give that folder, or files of "
            "records"
        )
    used = {*sentences, *(_boxes_of(path) for path in sentences)}
    units = [Unit(str(path), bytes=IMAGE_BYTES * 5) for path in sentences]
    units[0].extra["other"] = count_by_suffix(path for path in files if path not in used)
    return units


def count_sentences(unit: Unit) -> Mapping[str, int]:
    """Count the sentences, and the other files of the folder."""
    other = unit.extra.get("other", {})
    with open(unit.path, "rb") as file:
        return {"records": sum(bool(line.strip()) for line in file), "files": sum(other.values())}


def read_sentences(unit: Unit) -> Iterator[Found | Rejected | NotRead]:
    """Yield a record of each sentence, in the form of captions with phrases. Phrases without a box are counted."""
    for name, count in unit.extra.get("other", {}).items():
        yield NotRead(name, count, {"files": count})
    path = Path(unit.path)
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    try:
        size, boxes = _annotations(_boxes_of(path))
    except BadSample as error:
        yield Rejected(path.name, error.reason, error.detail, {"records": len(lines)})
        return
    named: set[str] = set()
    without = 0
    for number, line in enumerate(lines, 1):
        origin = f"{path.name}:{number}"
        try:
            caption, found = _phrases(line.decode())
        except UnicodeDecodeError as error:
            yield Found(origin, BadSample("bad_record", f"not UTF-8: {error}"), {"records": 1})
            continue
        named |= {name for name, _, _ in found}
        phrases = [{"start": start, "end": end, "boxes": boxes[name]} for name, start, end in found if name in boxes]
        without += len(found) - len(phrases)
        record = {"image": f"{path.stem}.jpg", "caption": caption, "phrases": phrases, "box_format": "xyxy", **size}
        yield Found(origin, record, {"records": 1})
    if without:
        yield NotRead("phrase without a box", without)
    if unnamed := sum(len(boxes[name]) for name in boxes.keys() - named):
        yield NotRead("box: no sentence names it", unnamed)


def _boxes_of(sentences: Path) -> Path:
    return sentences.parent.parent / ANNOTATIONS / f"{sentences.stem}.xml"


def _phrases(line: str) -> tuple[str, list[tuple[str, int, int]]]:
    """Return a caption without its marks, and the (number, start, end) of its phrases."""
    caption, found, done = "", [], 0
    line = line.strip()
    for phrase in _PHRASE.finditer(line):
        caption += line[done : phrase.start()]
        found.append((phrase[1], len(caption), len(caption) + len(phrase[3])))
        caption += phrase[3]
        done = phrase.end()
    return caption + line[done:], found


def _annotations(path: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return the size of the image, and the boxes of each number. Raises BadSample."""
    try:
        root = ElementTree.fromstring(read_whole(path.name, path.parent))
        boxes: defaultdict[str, list[Any]] = defaultdict(list)
        for entry in root.iter("object"):
            if (given := entry.find("bndbox")) is None:
                continue
            x1, y1, x2, y2 = (float(given.findtext(side, "")) for side in _SIDES)
            for name in entry.findall("name"):
                boxes[name.text or ""].append([x1 - 1, y1 - 1, x2, y2])
        size = {side: float(root.findtext(f"size/{side}", "")) for side in ("width", "height")}
        return size, dict(boxes)
    except BadSample:
        raise
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise BadSample("bad_record", f"{path.name} is not an annotation of Flickr30k Entities: {error}") from error
