"""Charts, diagrams and cropped images of slides."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any

from lxml import etree
from PIL import Image

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media

_C = "{http://schemas.openxmlformats.org/drawingml/2006/chart}"
_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_D = "{http://schemas.openxmlformats.org/drawingml/2006/diagram}"
_R = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"
_DAY_ZERO, _DAY_ZERO_1904 = datetime(1899, 12, 30), datetime(1904, 1, 1)  # of the numbers that stand for dates
_QUOTED = re.compile(r'"[^"]*"|\[[^\]]*\]|\\.')  # in the format of a number: texts and colours
_NO_NODE = ("pres", "parTrans", "sibTrans", "doc")  # types of a diagram's points that hold no text of their own


def chart_blocks(space: Any) -> list[str]:
    """Return the title of a chart, and its data as tables of categories and series.

    Args:
        space: The root element of the chart's part. Its numbers are those that the file caches.
    """
    chart = space.find(f"{_C}chart")
    if chart is None:
        return []
    title = chart.find(f"{_C}title")
    blocks = [text] if title is not None and (text := _words(title)) else []
    tables: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}  # by category: (name of the series, values)
    since_1904 = space.find(f"{_C}date1904")
    is_1904 = since_1904 is not None and since_1904.get("val", "1") in ("1", "true")
    day_zero = _DAY_ZERO_1904 if is_1904 else _DAY_ZERO
    for number, series in enumerate(chart.iter(f"{_C}ser"), start=1):
        name = series.find(f"{_C}tx")
        categories = _points(series, "cat", day_zero) or _points(series, "xVal", day_zero)
        for value, addition in (("val", ""), ("yVal", ""), ("bubbleSize", " (size)")):
            if values := _points(series, value, day_zero):
                label = (_points(name) or [""])[0] if name is not None else ""
                length = max(len(values), len(categories))
                keys = [*categories, *map(str, range(len(categories) + 1, length + 1))]
                tables.setdefault(tuple(keys), []).append((f"{label or f'series {number}'}{addition}", values))
    for labels, columns in tables.items():
        rows = [["", *(label for label, _ in columns)]]
        for place, key in enumerate(labels):
            rows.append([key, *(values[place] if place < len(values) else "" for _, values in columns)])
        blocks.append(table_text(rows, header=True))
    return blocks


def table_text(rows: list[list[str]], *, header: bool) -> str:
    """Return rows of cells as a Markdown table."""
    lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
    if header and rows:
        lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def _points(element: Any, name: str = "", day_zero: datetime = _DAY_ZERO) -> list[str]:
    """Return cached points by their index, dates as 2024-12-31.

    Categories of several levels are joined, the outer one first.
    """
    data = element.find(_C + name) if name else element
    if data is None:
        return []
    are_dates = re.search("[yd]", _QUOTED.sub("", data.findtext(f".//{_C}formatCode") or ""), re.IGNORECASE) is not None
    levels = data.findall(f".//{_C}lvl") or [data]
    columns = []
    for level in reversed(levels):
        found = {int(point.get("idx", "0")): (point.findtext(f"{_C}v") or "") for point in level.iter(f"{_C}pt")}
        count = data.find(f".//{_C}ptCount")
        size = max([int(count.get("val", "0")) if count is not None else 0, *(place + 1 for place in found)])
        if are_dates:
            found = {place: _as_date(value, day_zero) for place, value in found.items()}
        columns.append([found.get(place, "") for place in range(min(size, 100_000))])
        for place in range(1, len(columns[-1])) if len(levels) > 1 and len(columns) < len(levels) else ():
            columns[-1][place] = columns[-1][place] or columns[-1][place - 1]  # an outer level is given once
    if not any(any(column) for column in columns):
        text = data.findtext(f"{_C}v")
        return [text] if text else []
    size = max(map(len, columns))
    return [" / ".join(column[place] for column in columns if place < len(column)) for place in range(size)]


def _as_date(value: str, day_zero: datetime) -> str:
    """Return the date, with its time if it has one, that a number of days stands for; another value unchanged."""
    try:
        moment = day_zero + timedelta(days=float(value))
    except (ValueError, OverflowError):
        return value
    return moment.date().isoformat() if moment.time() == datetime.min.time() else moment.isoformat(" ", "minutes")


def _words(element: Any) -> str:
    return " ".join("".join(text.text or "" for text in p.iter(f"{_A}t")) for p in element.iter(f"{_A}p")).strip()


def diagram_text(frame: Any, part: Any) -> str:
    """Return the text of a diagram (SmartArt) as a list.

    Args:
        frame: The element of its shape.
        part: The slide's part, which its data are related to.

    Raises:
        KeyError: Its data are not in the file.
    """
    data = etree.fromstring(part.related_part(frame.find(f".//{_D}relIds").get(f"{_R}dm")).blob, _parser())
    points = {point.get("modelId"): point for point in data.iter(f"{_D}pt")}
    children: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for link in data.iter(f"{_D}cxn"):
        if link.get("type", "parOf") == "parOf":
            children[link.get("srcId", "")].append((int(link.get("srcOrd", "0")), link.get("destId", "")))
    lines: list[str] = []
    seen: set[str] = set()

    def add(identity: str, depth: int) -> None:
        if identity in seen or identity not in points:
            return
        seen.add(identity)
        node = points[identity].get("type", "node") not in _NO_NODE
        text = _words(points[identity]) if node else ""
        if text:
            lines.append(f"{'  ' * depth}- {text}")
        for _, child in sorted(children[identity]):
            add(child, depth + bool(text))

    roots = [identity for identity, point in points.items() if point.get("type") == "doc"]
    for identity in (*roots, *points):
        add(identity, 0)
    return "\n".join(lines)


def _parser() -> etree.XMLParser:
    return etree.XMLParser(resolve_entities=False, no_network=True)


def cropped(media: Media, sides: tuple[float, float, float, float]) -> Media:
    """Return the visible part of an image.

    Args:
        media: The image.
        sides: The parts of its left, upper, right and lower side that are cut off, from 0 to 1. Negative: not cut.

    Raises:
        BadSample: unreadable_image.
    """
    left, top, right, bottom = (min(max(side, 0.0), 1.0) for side in sides)
    if not any((left, top, right, bottom)):
        return media
    buffer = io.BytesIO()
    try:
        image = Image.open(io.BytesIO(media.data))
        box = (
            round(left * image.width),
            round(top * image.height),
            round((1 - right) * image.width),
            round((1 - bottom) * image.height),
        )
        if box[2] <= box[0] or box[3] <= box[1]:
            return media
        part = image.crop(box)
        if media.extension == "jpg":
            part.convert("RGB").save(buffer, "JPEG", quality=95)
        else:
            (part.convert("RGB") if part.mode in ("CMYK", "YCbCr", "LAB", "HSV") else part).save(buffer, "PNG")
    except Exception as error:  # Pillow raises many types on damaged files
        raise BadSample("unreadable_image", f"it cannot be cropped: {error}") from error
    return Media("jpg" if media.extension == "jpg" else "png", buffer.getvalue())
