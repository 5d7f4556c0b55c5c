"""Randomly mutated documents of every kind: each file, page, slide and paragraph gets one fate."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from pptx import Presentation
from pptx.util import Inches

from data_pipeline.errors import DataError
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.sharding.accounting import Accounts
from tests.data_pipeline.inputs.reading import JPEG, check_accounts

LINE = "A line of words that is long enough to be the text of a page, and that all of its readers understand."
ELEMENTS = (
    "<p>{}</p>",
    "<h2>{}</h2>",
    "<ul><li>{}<li>more</ul>",
    "<table><tr><td colspan=2>{}<td>b</table>",
    "<img src='a.jpg'>",
    "<img src='gone.jpg' alt='{}'>",
    "<svg><text>{}</text></svg>",
    "<iframe src='x'></iframe>",
    "<div hidden>{}</div>",
    "<unknown-element>{}</unknown-element>",
    "<p>x<sup>{}</sup>",
    "<ruby>{}<rt>r</rt></ruby>",
    "<!-- {} -->",
    "<noscript><img src=a.jpg></noscript>",
)
BLOCKS = (
    "{}",
    "# {}",
    "- {}",
    "![alt](a.jpg)",
    "![](gone.jpg)",
    "| a |\n|---|\n| {} |",
    "```\n{}",
    "<div>{}",
    "",
    "---",
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes as they are, cut, or with one of them changed."""
    change = rng.random()
    if change < 0.6 or not data:
        return data
    position = rng.randrange(len(data))
    return data[:position] if change < 0.8 else data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :]


def html(rng: random.Random, folder: Path) -> dict[str, int]:
    (folder / "a.jpg").write_bytes(JPEG)
    body = "".join(rng.choice(ELEMENTS).format(f"words {n}") for n in range(rng.randint(0, 6)))
    (folder / "given.html").write_bytes(damaged(rng, f"<html><body><main>{body}</main></body></html>".encode()))
    return {"files": 1}


def html_page(rng: random.Random, folder: Path) -> dict[str, int]:
    html(rng, folder)
    return {"screenshots": 2}


def markdown(rng: random.Random, folder: Path) -> dict[str, int]:
    (folder / "a.jpg").write_bytes(JPEG)
    body = "\n\n".join(rng.choice(BLOCKS).format(f"words {n}") for n in range(rng.randint(0, 6)))
    (folder / "given.md").write_bytes(damaged(rng, body.encode()))
    return {"files": 1}


def text(rng: random.Random, folder: Path) -> dict[str, int]:
    (folder / "given.txt").write_bytes(damaged(rng, rng.choice((b"", b" \n", "Größe\r\n".encode(), LINE.encode()))))
    return {"files": 1}


def rendered_text(rng: random.Random, folder: Path) -> dict[str, int]:
    lines = [rng.choice(("", " ", "A short line", "\u4e2d\u6587", "\x00\x01", LINE)) for _ in range(rng.randint(1, 4))]
    (folder / "given.txt").write_text("\n".join(lines))
    return {}


def page_pairs(rng: random.Random, folder: Path) -> dict[str, int]:
    pages = folder / "given"
    pages.mkdir()
    for number in range(rng.randint(1, 3)):
        (pages / f"{number}.jpg").write_bytes(damaged(rng, JPEG))
        suffix = rng.choice((".md", ".html", ".txt", ".doc", ".MD"))
        (pages / f"{rng.choice((number, 'other'))}{suffix}").write_text(rng.choice(("", LINE)))
    return {"files": sum(1 for _ in pages.iterdir())}


def pdf(rng: random.Random, folder: Path) -> dict[str, int]:
    count = rng.randint(1, 4)
    contents = [rng.choice((LINE, "", "short", "\\377\\001\\002\\003")) for _ in range(count)]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, words in enumerate(contents):
        resources = "/Resources << /Font << /F 3 0 R >> >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {resources} /Contents {5 + 2 * number} 0 R >>"
        )
        drawn = f"BT /F 11 Tf 50 700 Td ({words}) Tj ET"
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    body = "".join(f"{number} 0 obj\n{content}\nendobj\n" for number, content in enumerate(objects, start=1))
    written = f"%PDF-1.7\n{body}trailer\n<< /Root 1 0 R >>\n%%EOF\n".encode("latin-1")
    data = damaged(rng, written)
    (folder / "given.pdf").write_bytes(data)
    return {"pages": count} if data == written else {}


def slides(rng: random.Random, folder: Path) -> dict[str, int]:
    presentation = Presentation()
    count = rng.randint(1, 3)
    for _ in range(count):
        slide = presentation.slides.add_slide(presentation.slide_layouts[6])
        for _ in range(rng.randint(0, 2)):
            box = slide.shapes.add_textbox(Inches(1), Inches(rng.randint(0, 5)), Inches(3), Inches(1))
            box.text_frame.text = rng.choice(("", LINE))
        if rng.random() < 0.3:
            slide.shapes.add_picture(io.BytesIO(JPEG), Inches(1), Inches(2))
        if rng.random() < 0.2:
            slide.element.set("show", "0")
    buffer = io.BytesIO()
    presentation.save(buffer)
    data = damaged(rng, buffer.getvalue()) if rng.random() < 0.2 else buffer.getvalue()
    (folder / "given.pptx").write_bytes(data)
    return {"slides": count} if data == buffer.getvalue() else {}


# name -> (writer, the kind on the command line)
MAKERS: dict[str, tuple[Callable[[random.Random, Path], dict[str, int]], str]] = {
    "html": (html, ""),
    "markdown": (markdown, ""),
    "text": (text, ""),
    "rendered_text": (rendered_text, "rendered_text"),
    "page_pairs": (page_pairs, "page_pairs"),
    "pdf": (pdf, ""),
    "pages": (pdf, "pages"),
    "slides": (slides, ""),
    "gui": (html_page, "gui"),
}
SEEDS, MANY_SEEDS = {"gui": 3}, {"gui": 60}  # of kinds that need a browser; of any other 15 and 2,000


def check(maker: str, seed: int, folder: Path) -> None:
    """Write and read one document, and compare the accounts with what was written."""
    write, kind = MAKERS[maker]
    folder.mkdir(parents=True)
    items = write(random.Random(f"{maker} {seed}"), folder)
    [path] = folder.glob("given*")
    try:
        [(_, given)] = open_inputs([str(path)], kind)
        units = list(given.units())
    except DataError:  # refused as a whole
        return
    accounts = Accounts()
    for unit in units:
        check_accounts(given, unit, list(given.read(unit)))
        accounts.give(given.given(unit))
    for level, count in items.items():
        assert accounts.levels[level]["given"] == count, (maker, seed, accounts.as_json())


@pytest.mark.parametrize("maker", MAKERS)
def test_mutated_documents_lose_no_item(maker: str, tmp_path: Path) -> None:
    for seed in range(SEEDS.get(maker, 15)):
        check(maker, seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_2000_mutated_documents_lose_no_item(maker: str, tmp_path: Path) -> None:
    for seed in range(1000, 1000 + MANY_SEEDS.get(maker, 2000)):
        check(maker, seed, tmp_path / str(seed))
