"""PDFs in Arabic and Hebrew that chromium prints: the text of the page that was printed, in documents and in pages."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from bidi import get_display

from data_pipeline.inputs.documents.right_to_left import logical_line
from tests.data_pipeline.chromium import print_to_pdf
from tests.data_pipeline.inputs.reading import opened, read

PARAGRAPHS = [
    "هذه فقرة قصيرة باللغة العربية تحتوي على رقم 2024 وكلمة English في وسطها، وهي طويلة بما يكفي لتمتد على أكثر من سطر "
    "واحد في الصفحة المطبوعة حتى نرى ترتيب الكلمات.",
    "قال الكاتب (في كتابه الأول) إن 12.5% من الصفحات [انظر 3] كتبت بلغة C++ بين 1998 و 2003، أليس كذلك؟",
    "بِسْمِ اللَّهِ الرَّحْمَٰنِ الرَّحِيمِ",
    'זהו משפט קצר בעברית עם המספר 42 ועם המילים Open Source באמצע, ומחיר של 15.50 ש"ח (כולל מע"מ), והוא ארוך מספיק כדי '
    "להימשך יותר משורה אחת בעמוד המודפס.",
    "שָׁלוֹם עוֹלָם",
    "This paragraph is written in English and ends with a point.",
]
STYLE = "<style>@page { size: A4; margin: 2cm } body { font: 12pt 'DejaVu Sans' } h1 { font-size: 20pt }</style>"


def printed(folder: Path, body: str) -> Path:
    html = f'<!doctype html><html dir="rtl" lang="ar"><meta charset="utf-8">{STYLE}<body>{body}'
    (folder / "page.html").write_text(html)
    print_to_pdf(folder / "page.html", folder / "page.pdf")
    return folder / "page.pdf"


def text_of(path: Path, kind: str) -> str:
    [draft], rejected = read(opened(path, kind=kind, settings=["min_characters=10"] if kind == "pages" else []))
    assert not rejected
    return draft.record["text"]


def tags(paragraphs: list[str]) -> str:
    return "".join(f'<p dir="{"ltr" if text.isascii() else "rtl"}">{text}</p>' for text in paragraphs)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("page"), f"<h1>مرحبا بالعالم</h1>{tags(PARAGRAPHS)}")


@pytest.mark.parametrize("kind", ["pdf", "pages"])
def test_text_from_right_to_left_is_read_in_logical_order(page, kind):
    expected = [unicodedata.normalize("NFC", text) for text in ("مرحبا بالعالم", *PARAGRAPHS)]
    assert text_of(page, kind).split("\n\n") == expected


def test_the_right_column_is_read_first(tmp_path):
    words = " ".join(PARAGRAPHS[0].split()[:12])
    body = f'<div style="column-count: 2; column-gap: 1cm; column-fill: auto; height: 5cm">{(words + " ") * 10}</div>'
    assert text_of(printed(tmp_path, body), "pdf").split() == (words.split() * 10)


def test_hebrew_words_in_an_english_page_are_read_in_logical_order(tmp_path):
    text = "The greeting שלום עולם means hello world, and the number 42 is (ארבעים ושתיים) in words."
    assert text_of(printed(tmp_path, f'<p dir="ltr">{text}</p>'), "pdf") == text


def test_cells_of_a_table_are_read_from_right_to_left(tmp_path):
    rows = [("الاسم", "العمر", "المدينة"), ("أحمد", "31", "القاهرة"), ("سارة", "28", "بيروت")]
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    assert text_of(printed(tmp_path, f"<table cellpadding=12>{cells}</table>"), "pdf").split() == [
        cell for row in rows for cell in row
    ]


@pytest.mark.parametrize("text", ["2024-05 رقم", "رقم 2024-05", "في 12/05/2020 كتب", "العدد ٢٠٢٤ و ١٢٫٥", "1. البند"])
def test_what_the_bidirectional_algorithm_shows_is_inverted(text):
    assert logical_line(get_display(text, base_dir="R"), rtl_page=True) == text


def test_presentation_forms_become_letters():
    assert logical_line("ﻡﻼﺳ", rtl_page=True) == "سلام"
    assert logical_line("ﷺ", rtl_page=True) == unicodedata.normalize("NFKC", "ﷺ")
    assert re.fullmatch("x²", logical_line("x²", rtl_page=False))  # other characters keep their form
