"""Reading order and paragraphs of page items, without a PDF."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.inputs.documents.page_geometry import Rect
from data_pipeline.inputs.documents.reading_order import PageItem, joined_lines, lines_in_order, paragraphs

pytestmark = pytest.mark.fast


def line(text: str, left: float, top: float, width: float) -> PageItem:
    return PageItem(Rect(left, top, left + width, top + 10), text, 10)


def column(name: str, left: float, top: float, rows: int) -> list[PageItem]:
    return [line(f"{name}{row} and some more words", left, top + 12 * row, 200) for row in range(rows)]


def test_columns_are_read_between_items_that_span_them():
    expected = [
        line("A title over all of it", 100, 10, 300),
        *column("a", 40, 40, 5),
        *column("b", 270, 40, 5),
        PageItem(Rect(50, 110, 450, 200), figure="wide"),
        line("Figure 1: what spans both columns", 60, 210, 380),
        *column("c", 40, 240, 4),
        *column("d", 270, 240, 6),
    ]
    for seed in range(20):
        shuffled = [expected[index] for index in np.random.default_rng(seed).permutation(len(expected))]
        found = lines_in_order(shuffled)
        assert [item.text or item.figure for item in found] == [item.text or item.figure for item in expected]


def test_three_columns_are_divided_twice():
    expected = [item for name, left in (("a", 20), ("b", 240), ("c", 460)) for item in column(name, left, 30, 8)]
    found = lines_in_order([expected[index] for index in np.random.default_rng(1).permutation(len(expected))])
    assert [item.text for item in found] == [item.text for item in expected]


def test_tables_and_numbered_lines_are_read_by_rows():
    table = [
        line(f"{cell}{row}", 40 + 150 * position, 20 + 12 * row, 30)
        for row in range(9)
        for position, cell in enumerate("xyz")
    ]
    assert [found.text for found in lines_in_order(table)] == [f"x{row} y{row} z{row}" for row in range(9)]
    numbered = [
        item for row in range(9) for item in (line(f"{row}.", 20, 12 * row, 8), line("words " * 5, 40, 12 * row, 300))
    ]
    assert [found.text for found in lines_in_order(numbered)] == [f"{row}. {'words ' * 5}" for row in range(9)]


def test_paragraphs_begin_at_gaps_indents_and_other_font_sizes():
    lines = [
        PageItem(Rect(40, 0, 200, 20), "A heading", 20),
        line("First paragraph that runs over", 40, 30, 300),
        line("two lines and ends here, quite far right.", 40, 42, 290),
        line("Second one, indented by an em and a half,", 55, 54, 285),
        line("continues at the margin.", 40, 66, 150),
        line("After a gap, the third.", 40, 100, 160),
    ]
    assert [item.text for item in paragraphs(lines_in_order(lines))] == [
        "A heading",
        "First paragraph that runs over two lines and ends here, quite far right.",
        "Second one, indented by an em and a half, continues at the margin.",
        "After a gap, the third.",
    ]


@pytest.mark.parametrize(
    ("first", "second", "words", "joined"),
    [
        ("an infor-", "mation desk", set(), "an information desk"),
        ("an infor‐", "mation desk", set(), "an information desk"),
        ("a well-", "known desk", {"well-known"}, "a well-known desk"),
        ("a well-", "known desk", {"well-known", "wellknown"}, "a wellknown desk"),
        ("state-of-the-", "art desks", set(), "state-of-the-art desks"),
        ("a fixed-", "length list", {"fixed", "length"}, "a fixed-length list"),
        ("from 1990-", "2000 on", set(), "from 1990- 2000 on"),
        ("the Franco-", "Prussian war", set(), "the Franco- Prussian war"),
        ("图中有一只", "猫。", set(), "图中有一只猫。"),
        ("plain words", "follow", set(), "plain words follow"),
    ],
)
def test_lines_are_joined_without_false_hyphens(first, second, words, joined):
    assert joined_lines(first, second, words) == joined
