"""The reading order of a page, from geometry alone.

A gutter is a vertical strip that is empty in many rows. It divides the page into columns. Items that cross the gutter
(a title over two columns, a wide figure) divide the columns into bands. In each band the left column is read before the
right one. Each column is divided again in the same way.

    +-----------------+
    |  1 title        |       crosses the gutter
    |  2 a  |  4 c    |
    |  3 b  |  5 d    |       the columns of one band, left before right
    |  6 wide figure  |
    |  7    |  8      |
    +-----------------+

Lengths are in points, y grows downwards. A page that is read from right to left is mirrored first, so that its right
column is read before the left one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from data_pipeline.inputs.documents.page_geometry import Rect
from data_pipeline.inputs.documents.right_to_left import logical_line

MIN_GUTTER_ROWS = 3  # rows with text on both sides that make a gap a gutter
MIN_COLUMN_CHARACTERS = 12  # in a line of a column; table cells and list numbers are shorter
SPLIT_GAP = 0.7  # of the font size: a wider gap within a line may be a gutter
WORD_GAP = 0.15  # of the font size: a wider gap is a space
HYPHENS = "-\u2010\u00ad"


@dataclass(frozen=True)
class PageItem:
    """Text on one line of a page, or a figure."""

    rect: Rect
    text: str = ""  # empty for a figure
    font_size: float = 0.0  # points
    monospaced: bool = False  # set in a fixed-width font, as code is
    figure: Any = None
    column: int = -1  # number of its column on the page
    visual: bool = False  # the text is in visual order, from left to right, with words written from right to left
    mirrored: bool = False  # x is measured from the right edge, as the page is read from right to left


def lines_in_order(items: Sequence[PageItem]) -> list[PageItem]:
    """Return the lines and figures of a page in reading order, with the items of one line joined.

    Args:
        items: Items of one page, in any order.
    """
    lines: list[PageItem] = []
    for number, column in enumerate(_columns(list(items))):
        lines += [replace(line, column=number) for line in _rows(column)]
    return lines


def _columns(items: list[PageItem]) -> Iterator[list[PageItem]]:
    """Yield groups of items without a gutter, in reading order."""
    gutter = _gutter(items)
    if gutter is None:
        if items:
            yield items
        return
    spanning = [item for item in items if item.rect.left < gutter < item.rect.right]
    rest = [item for item in items if not item.rect.left < gutter < item.rect.right]
    # Items in one row with spanning text belong to that text.
    wide_text = [item for item in spanning if item.figure is None]
    spanning += [item for item in rest if any(item.rect.beside(wide.rect) for wide in wide_text)]
    spanning_ids = {id(item) for item in spanning}
    spanning.sort(key=lambda item: item.rect.middle)
    bands: list[tuple[list[PageItem], list[PageItem], list[PageItem]]] = [([], [], [])]  # left, right, spanning below
    remaining = sorted((item for item in rest if id(item) not in spanning_ids), key=lambda item: item.rect.middle)
    for wide in spanning:
        above = [item for item in remaining if item.rect.middle < wide.rect.middle]
        remaining = remaining[len(above) :]
        if above and bands[-1][2]:
            bands.append(([], [], []))
        for item in above:
            bands[-1][item.rect.left >= gutter].append(item)
        bands[-1][2].append(wide)
    bands.append(([], [], []))
    for item in remaining:
        bands[-1][item.rect.left >= gutter].append(item)
    for left, right, below in bands:
        yield from _columns(left)
        yield from _columns(right)
        if below:
            yield below


def _gutter(items: list[PageItem]) -> float | None:
    """Return the x coordinate of the gutter between two columns, or None if there is only one column."""
    texts = [item for item in items if item.figure is None]
    gaps: list[tuple[float, float, PageItem, PageItem]] = []
    for left in texts:
        beside = [right for right in texts if right.rect.left > left.rect.right and right.rect.beside(left.rect)]
        if beside:
            right = min(beside, key=lambda item: item.rect.left)
            if right.rect.left - left.rect.right > SPLIT_GAP * min(left.font_size, right.font_size):
                gaps.append((left.rect.right, right.rect.left, left, right))
    tried: set[int] = set()
    while True:
        votes = [
            (sum(start < edge <= end for start, end, *_ in gaps), edge)
            for number, edge in enumerate(end for _, end, *_ in gaps)
            if number not in tried
        ]
        count, edge = max(votes, default=(0, 0.0))
        if count < MIN_GUTTER_ROWS:
            return None
        voters = [gap for gap in gaps if gap[0] < edge <= gap[1]]
        if _are_columns([left for *_, left, _ in voters]) and _are_columns([right for *_, right in voters]):
            return (max(start for start, *_ in voters) + edge) / 2
        tried |= {number for number, gap in enumerate(gaps) if gap[0] < edge <= gap[1]}


def _are_columns(lines: list[PageItem]) -> bool:
    """Return whether these are lines of running text, not table cells or list numbers.

    Lines of running text are long, and most of them are nearly as wide as the longest one.
    """
    width = max(line.rect.right for line in lines) - min(line.rect.left for line in lines)
    return (
        median(len(line.text) for line in lines) >= MIN_COLUMN_CHARACTERS
        and median(line.rect.width for line in lines) > 0.6 * width
    )


def _rows(items: list[PageItem]) -> list[PageItem]:
    """Return one column's lines from top to bottom, each from left to right, with figures at their upper edges."""
    rows: list[list[PageItem]] = []
    for item in sorted((item for item in items if item.figure is None), key=lambda item: item.rect.middle):
        row = next((row for row in reversed(rows[-3:]) if any(item.rect.beside(other.rect) for other in row)), None)
        if row is None:
            rows.append([item])
        else:
            row.append(item)
    lines = [_joined(sorted(row, key=lambda item: item.rect.left)) for row in rows]
    for figure in sorted((item for item in items if item.figure is not None), key=lambda item: item.rect.top):
        position = next((at for at, line in enumerate(lines) if line.rect.middle > figure.rect.top), len(lines))
        lines.insert(position, figure)
    return lines


def _joined(row: list[PageItem]) -> PageItem:
    rect, text = row[0].rect, row[0].text
    for item in row[1:]:
        gap = item.rect.left - rect.right
        spaces = max(1, round(gap / (0.6 * item.font_size))) if item.monospaced and item.font_size else 1
        space = " " * spaces if gap > WORD_GAP * item.font_size else ""
        text = item.text + space + text if item.mirrored else text + space + item.text
        rect = rect.union(item.rect)
    longest = max(row, key=lambda item: len(item.text))
    if any(item.visual for item in row):
        text = logical_line(text, rtl_page=longest.mirrored)
    return PageItem(rect, text, longest.font_size, longest.monospaced, mirrored=longest.mirrored)


# --- paragraphs -------------------------------------------------------------------------------------------------------

_LIST_ITEM = re.compile(r"[•◦▪‣–∗]\s|\[\d{1,3}\]\s|\(?(?:\d{1,2}|[a-z])[.)]\s")
_CAPTION = re.compile(r"(?:Fig(?:ure|\.)|Table|Algorithm|Listing|Scheme|Plate)\s*[\dA-Z]", re.IGNORECASE)
_CONTENTS_LINE = re.compile(r"(?:\. ?){4,} ?\w+$")  # of a table of contents: dots, then the page number
_SENTENCE_END = re.compile(r"[.!?:;。！？：；؟؛۔][\"'”’)\]]*$")
_CJK = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


def paragraphs(lines: Sequence[PageItem]) -> list[PageItem]:
    """Join lines to paragraphs, and the parts of hyphenated words to words. Code keeps its lines.

    Args:
        lines: Lines and figures in reading order, as `lines_in_order` returns them.

    Returns:
        Paragraphs and figures in reading order.
    """
    words = _whole_words(lines)
    edges = _column_edges(lines)
    found: list[PageItem] = []
    previous: PageItem | None = None
    starts_paragraph = True
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else None
        if line.figure is not None or previous is None or previous.figure is not None:
            new = True
        elif line.column != previous.column or line.rect.top < previous.rect.top:
            new = not _continues_in_next_column(previous, line)
        else:
            new = _begins_paragraph(previous, line, following, edges[line.column], starts_paragraph)
        if new:
            indent = _indent(line, edges.get(line.column)) if line.monospaced else ""
            found.append(replace(line, text=indent + line.text))
        else:
            found[-1] = replace(found[-1], text=_extended(found[-1].text, line, edges[line.column], words))
        starts_paragraph = new
        previous = line
    return found


def _whole_words(lines: Sequence[PageItem]) -> set[str]:
    """Return the words of a document that are not divided at the end of a line."""
    words: set[str] = set()
    divided = False
    for line in lines:
        found = re.findall(r"\w[\w-]*", line.text)
        ends_divided = line.text[-1:] in HYPHENS and bool(line.text)
        words.update(found[divided : len(found) - ends_divided])
        divided = ends_divided
    return words


def is_caption(text: str) -> bool:
    """Return whether a text begins as the caption of a figure or table."""
    return _CAPTION.match(text) is not None


@dataclass(frozen=True)
class _ColumnEdges:
    """Where the lines of a column begin and end, in points."""

    left: float
    right: float
    font_size: float  # median
    pitch: float  # distance between the middles of two lines


def _column_edges(lines: Sequence[PageItem]) -> dict[int, _ColumnEdges]:
    columns: dict[int, list[PageItem]] = {}
    for line in lines:
        if line.figure is None:
            columns.setdefault(line.column, []).append(line)
    edges = {}
    for column, members in columns.items():
        pitches = [
            below.rect.middle - above.rect.middle
            for above, below in pairwise(members)
            if abs(above.font_size - below.font_size) < 0.1 * above.font_size and below.rect.middle > above.rect.middle
        ]
        size = median(line.font_size for line in members)
        if members[0].mirrored and pitches:  # in a short column, more than half of the pitches are between paragraphs
            pitches = sorted(pitches)[: max(1, len(pitches) // 2)]
        pitch = min(median(pitches), 2 * size) if pitches else 1.3 * size
        edges[column] = _ColumnEdges(
            min(line.rect.left for line in members), max(line.rect.right for line in members), size, pitch
        )
    return edges


def _begins_paragraph(
    previous: PageItem, line: PageItem, following: PageItem | None, column: _ColumnEdges, after_first: bool
) -> bool:
    """Return whether a line begins a paragraph. `after_first`: `previous`, the line above it, began one."""
    em = line.font_size or 10.0
    shift = line.rect.left - previous.rect.left
    distance = line.rect.middle - previous.rect.middle
    if line.monospaced and previous.monospaced:
        return distance > 2.6 * column.pitch
    if line.monospaced != previous.monospaced and (len(line.text) > 3 or len(previous.text) > 3):
        return True
    if distance > 1.3 * column.pitch * max(1.0, line.font_size / (column.font_size or em)):
        return True
    if _sizes_differ(previous, line):
        return True
    if _LIST_ITEM.match(line.text) and previous.text[-1:] not in HYPHENS:
        return True
    if _CONTENTS_LINE.search(previous.text):
        return True
    ends_early = previous.rect.right < column.right - 0.25 * (column.right - column.left)
    if ends_early and _SENTENCE_END.search(previous.text):
        return True
    if abs(line.rect.left + line.rect.right - previous.rect.left - previous.rect.right) < em:
        return False  # both are centred
    if 0.8 * em < shift < 5 * em:  # indented: the first line of a paragraph, or a later line of a list item
        return following is None or following.figure is not None or following.rect.left < line.rect.left - 0.5 * em
    return -shift > 0.8 * em and not after_first  # back at the margin after indented lines


def _continues_in_next_column(previous: PageItem, line: PageItem) -> bool:
    """Return whether a paragraph that reached the end of its column continues with this line of the next one."""
    if _sizes_differ(previous, line) or line.monospaced or previous.monospaced:
        return False
    return not _SENTENCE_END.search(previous.text) and line.text[:1].islower()


def _sizes_differ(first: PageItem, second: PageItem) -> bool:
    return abs(second.font_size - first.font_size) > 0.12 * max(second.font_size, first.font_size)


def _extended(text: str, line: PageItem, column: _ColumnEdges, words: set[str]) -> str:
    if line.monospaced:
        return f"{text}\n{_indent(line, column)}{line.text}"
    return joined_lines(text, line.text, words)


def _indent(line: PageItem, column: _ColumnEdges | None) -> str:
    if not column or not line.font_size:
        return ""
    return " " * round((line.rect.left - column.left) / (0.6 * line.font_size))


def joined_lines(first: str, second: str, words: set[str]) -> str:
    """Return two lines of a paragraph as one.

    A word that is hyphenated at the end of `first` is joined. It keeps its hyphen if `words` show that the word has
    one: the word occurs with its hyphen, or both parts of it occur alone.

    Args:
        first: A line, or a paragraph so far.
        second: The next line.
        words: The words of the document that are not divided at the end of a line.
    """
    if first[-1:] in HYPHENS and first[-2:-1].isalpha() and second[:1].islower():
        head = re.findall(r"[\w-]*$", first[:-1])[0]
        tail = re.findall(r"^[\w-]*", second)[0]
        compound = f"{head}-{tail}" in words or "-" in head or (min(len(head), len(tail)) > 3 and {head, tail} <= words)
        keep = first[-1] != "\u00ad" and head + tail not in words and compound
        return first[:-1] + ("-" if keep else "") + second
    if _CJK.match(first[-1:]) and _CJK.match(second[:1]):
        return first + second
    return f"{first} {second}"
