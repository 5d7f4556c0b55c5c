"""The reading order of a page, from geometry alone.

Reading order is found by cutting: a gutter is a vertical strip that many rows leave free. What crosses it (a title over
two columns, a wide figure) is read where it stands, and between two such things the left column is read before the
right one. Each column is cut again in the same way.

    +-----------------+
    |  1 title        |       spanning what would be the gutter
    |  2 a  |  4 c    |
    |  3 b  |  5 d    |       the gutter: columns are read one after the other
    |  6 wide figure  |
    |  7    |  8      |
    +-----------------+

Lengths are in points, y grows downwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

MIN_GUTTER_ROWS = 3  # rows with text on both sides before a gap between them is a gutter
MIN_COLUMN_CHARACTERS = 12  # a line of a column; cells of tables and numbers of lists are shorter
SPLIT_GAP = 0.7  # of the font size: a wider gap within a line may be a gutter
HYPHENS = "-\u2010\u00ad"


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def area(self) -> float:
        return max(self.width, 0.0) * max(self.height, 0.0)

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2

    def union(self, other: Box) -> Box:
        return Box(
            *(min(self.left, other.left), min(self.top, other.top)),
            *(max(self.right, other.right), max(self.bottom, other.bottom)),
        )

    def intersection(self, other: Box) -> Box:
        """Of width or height <= 0 where they do not meet."""
        return Box(
            *(max(self.left, other.left), max(self.top, other.top)),
            *(min(self.right, other.right), min(self.bottom, other.bottom)),
        )

    def grown(self, by: float) -> Box:
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def beside(self, other: Box) -> bool:
        """Whether they share a row: their heights overlap by half of the smaller one."""
        shared = min(self.bottom, other.bottom) - max(self.top, other.top)
        return shared > 0.5 * max(min(self.height, other.height), 0.1)


@dataclass(frozen=True)
class Piece:
    """A run of text on one line, or a figure (text empty). size: of the font; fixed: a typewriter's font, as code is
    set in; column: which column of its page it belongs to, by number."""

    box: Box
    text: str = ""
    size: float = 0.0
    fixed: bool = False
    figure: Any = None
    column: int = -1


def lines_in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of a page in any order -> its lines and figures in reading order, pieces of one line joined."""
    lines: list[Piece] = []
    for number, column in enumerate(_columns(list(pieces))):
        lines += [replace(line, column=number) for line in _rows(column)]
    return lines


def _columns(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Groups of pieces without a gutter, in reading order."""
    gutter = _gutter(pieces)
    if gutter is None:
        if pieces:
            yield pieces
        return
    spanning = [piece for piece in pieces if piece.box.left < gutter < piece.box.right]
    rest = [piece for piece in pieces if not piece.box.left < gutter < piece.box.right]
    # What stands in one row with spanning text belongs to it.
    wide_text = [piece for piece in spanning if piece.figure is None]
    spanning += [piece for piece in rest if any(piece.box.beside(wide.box) for wide in wide_text)]
    beside = {id(piece) for piece in spanning}
    spanning.sort(key=lambda piece: piece.box.middle)
    bands: list[tuple[list[Piece], list[Piece], list[Piece]]] = [([], [], [])]  # left, right, what spans below them
    remaining = sorted((piece for piece in rest if id(piece) not in beside), key=lambda piece: piece.box.middle)
    for wide in spanning:
        above = [piece for piece in remaining if piece.box.middle < wide.box.middle]
        remaining = remaining[len(above) :]
        if above and bands[-1][2]:
            bands.append(([], [], []))
        for piece in above:
            bands[-1][piece.box.left >= gutter].append(piece)
        bands[-1][2].append(wide)
    bands.append(([], [], []))
    for piece in remaining:
        bands[-1][piece.box.left >= gutter].append(piece)
    for left, right, below in bands:
        yield from _columns(left)
        yield from _columns(right)
        if below:
            yield below


def _gutter(pieces: list[Piece]) -> float | None:
    """Where the gutter between two columns stands; None if there is but one column."""
    texts = [piece for piece in pieces if piece.figure is None]
    gaps: list[tuple[float, float, Piece, Piece]] = []
    for left in texts:
        beside = [right for right in texts if right.box.left > left.box.right and right.box.beside(left.box)]
        if beside:
            right = min(beside, key=lambda piece: piece.box.left)
            if right.box.left - left.box.right > SPLIT_GAP * min(left.size, right.size):
                gaps.append((left.box.right, right.box.left, left, right))
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


def _are_columns(lines: list[Piece]) -> bool:
    """Whether these are lines of running text rather than cells of a table or numbers of a list: long, and filling the
    width that the longest of them takes."""
    width = max(line.box.right for line in lines) - min(line.box.left for line in lines)
    return (
        median(len(line.text) for line in lines) >= MIN_COLUMN_CHARACTERS
        and median(line.box.width for line in lines) > 0.6 * width
    )


def _rows(pieces: list[Piece]) -> list[Piece]:
    """One column's lines from top to bottom, each from left to right; figures where their upper edge stands."""
    rows: list[list[Piece]] = []
    for piece in sorted((piece for piece in pieces if piece.figure is None), key=lambda piece: piece.box.middle):
        row = next((row for row in reversed(rows[-3:]) if any(piece.box.beside(other.box) for other in row)), None)
        if row is None:
            rows.append([piece])
        else:
            row.append(piece)
    lines = [_joined(sorted(row, key=lambda piece: piece.box.left)) for row in rows]
    for figure in sorted((piece for piece in pieces if piece.figure is not None), key=lambda piece: piece.box.top):
        place = next((place for place, line in enumerate(lines) if line.box.middle > figure.box.top), len(lines))
        lines.insert(place, figure)
    return lines


def _joined(row: list[Piece]) -> Piece:
    box, text = row[0].box, row[0].text
    for piece in row[1:]:
        gap = piece.box.left - box.right
        spaces = max(1, round(gap / (0.6 * piece.size))) if piece.fixed and piece.size else 1
        text += (" " * spaces if gap > 0.15 * piece.size else "") + piece.text
        box = box.union(piece.box)
    longest = max(row, key=lambda piece: len(piece.text))
    return Piece(box, text, longest.size, longest.fixed)


# --- paragraphs -------------------------------------------------------------------------------------------------------

_ITEM = re.compile(r"[•◦▪‣–∗]\s|\[\d{1,3}\]\s|\(?(?:\d{1,2}|[a-z])[.)]\s")
_CAPTION = re.compile(r"(?:Fig(?:ure|\.)|Table|Algorithm|Listing|Scheme|Plate)\s*[\dA-Z]", re.IGNORECASE)
_LEADER = re.compile(r"(?:\. ?){4,} ?\w+$")  # a line of a table of contents: dots, then the page
_CLOSED = re.compile(r"[.!?:;。！？：；][\"'”’)\]]*$")
_CJK = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


def paragraphs(lines: Sequence[Piece]) -> list[Piece]:
    """Lines in reading order -> paragraphs and figures, hyphenated words joined. Code keeps its lines."""
    words = _whole_words(lines)
    edges = _column_edges(lines)
    found: list[Piece] = []
    previous: Piece | None = None
    starts_paragraph = True
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else None
        if line.figure is not None or previous is None or previous.figure is not None:
            new = True
        elif line.column != previous.column or line.box.top < previous.box.top:
            new = not _goes_on(previous, line)
        else:
            new = _begins(previous, line, following, edges[line.column], starts_paragraph)
        if new:
            indent = _indent(line, edges.get(line.column)) if line.fixed else ""
            found.append(replace(line, text=indent + line.text))
        else:
            found[-1] = replace(found[-1], text=_continued(found[-1].text, line, edges[line.column], words))
        starts_paragraph = new
        previous = line
    return found


def _whole_words(lines: Sequence[Piece]) -> set[str]:
    """The words of a document that no line's end cuts."""
    words: set[str] = set()
    cut = False
    for line in lines:
        found = re.findall(r"\w[\w-]*", line.text)
        ends_cut = line.text[-1:] in HYPHENS and bool(line.text)
        words.update(found[cut : len(found) - ends_cut])
        cut = ends_cut
    return words


def is_caption(text: str) -> bool:
    return _CAPTION.match(text) is not None


@dataclass(frozen=True)
class _Edges:
    """Of a column: where its lines begin and end, how large they are, and how far apart they stand."""

    left: float
    right: float
    size: float
    pitch: float


def _column_edges(lines: Sequence[Piece]) -> dict[int, _Edges]:
    columns: dict[int, list[Piece]] = {}
    for line in lines:
        if line.figure is None:
            columns.setdefault(line.column, []).append(line)
    edges = {}
    for column, members in columns.items():
        pitches = [
            below.box.middle - above.box.middle
            for above, below in pairwise(members)
            if abs(above.size - below.size) < 0.1 * above.size and below.box.middle > above.box.middle
        ]
        size = median(line.size for line in members)
        pitch = min(median(pitches), 2 * size) if pitches else 1.3 * size
        edges[column] = _Edges(
            min(line.box.left for line in members), max(line.box.right for line in members), size, pitch
        )
    return edges


def _begins(previous: Piece, line: Piece, following: Piece | None, column: _Edges, after_first: bool) -> bool:
    """Whether a line begins a paragraph, the previous one standing above it in its column."""
    em = line.size or 10.0
    shift = line.box.left - previous.box.left
    if line.fixed and previous.fixed:
        return line.box.middle - previous.box.middle > 2.6 * column.pitch
    if line.fixed != previous.fixed and (len(line.text) > 3 or len(previous.text) > 3):
        return True
    if line.box.middle - previous.box.middle > 1.3 * column.pitch * max(1.0, line.size / (column.size or em)):
        return True
    if abs(line.size - previous.size) > 0.12 * max(line.size, previous.size):
        return True
    if _ITEM.match(line.text) and previous.text[-1:] not in HYPHENS:
        return True
    if _LEADER.search(previous.text):
        return True
    ended = previous.box.right < column.right - 0.25 * (column.right - column.left)
    if ended and _CLOSED.search(previous.text):
        return True
    if abs(line.box.left + line.box.right - previous.box.left - previous.box.right) < em:
        return False  # both are centred
    if 0.8 * em < shift < 5 * em:  # indented: the first line of a paragraph, or all but the first of a list's item
        return following is None or following.figure is not None or following.box.left < line.box.left - 0.5 * em
    return -shift > 0.8 * em and not after_first  # back to the margin after lines that hung


def _goes_on(previous: Piece, line: Piece) -> bool:
    """Whether a paragraph that met the end of its column goes on in the next."""
    if abs(line.size - previous.size) > 0.12 * max(line.size, previous.size) or line.fixed or previous.fixed:
        return False
    return not _CLOSED.search(previous.text) and line.text[:1].islower()


def _continued(text: str, line: Piece, column: _Edges, words: set[str]) -> str:
    if line.fixed:
        return f"{text}\n{_indent(line, column)}{line.text}"
    return joined_lines(text, line.text, words)


def _indent(line: Piece, column: _Edges | None) -> str:
    return " " * round((line.box.left - column.left) / (0.6 * line.size)) if column and line.size else ""


def joined_lines(first: str, second: str, words: set[str]) -> str:
    """Two lines of a paragraph as one. A word hyphenated at the line's end is joined, unless the document's words say
    that the hyphen is its own: it stands elsewhere with it, or both parts stand elsewhere alone."""
    if first[-1:] in HYPHENS and first[-2:-1].isalpha() and second[:1].islower():
        head = re.findall(r"[\w-]*$", first[:-1])[0]
        tail = re.findall(r"^[\w-]*", second)[0]
        compound = f"{head}-{tail}" in words or "-" in head or (min(len(head), len(tail)) > 3 and {head, tail} <= words)
        keep = first[-1] != "\u00ad" and head + tail not in words and compound
        return first[:-1] + ("-" if keep else "") + second
    if _CJK.match(first[-1:]) and _CJK.match(second[:1]):
        return first + second
    return f"{first} {second}"
