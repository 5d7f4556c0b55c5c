"""Web pages and Markdown as interleaved samples: the main content as text, with the images at their positions.

    python -m tools.shard build --input site/ --out shards/site --tokenizer TOKENIZER

Markdown is rendered to HTML first, so both have one reader (html_blocks.py). Nothing is fetched from the network.
Images are read only from the folder of their document, unless `allow_outside` is set.
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.dammit import EncodingDetector
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, reference
from markdown_it.rules_inline import StateInline

from data_pipeline.errors import BadSample
from data_pipeline.inputs.documents.html_blocks import BlockReader
from data_pipeline.inputs.documents.html_content import collapse_spaces, has_text_outside, main_content
from data_pipeline.inputs.documents.html_images import ImageRules
from data_pipeline.inputs.draft import ONE_FILE, Draft, Rejected, Unit
from data_pipeline.inputs.flow import file_units, flow_draft, read_document, read_text
from data_pipeline.inputs.names import shown_names

# Python's name of a declared encoding -> the encoding that browsers use for it (WHATWG Encoding Standard). Pages that
# declare the smaller character set are written in the larger one. A page that can declare UTF-16 in single bytes is
# not written in it.
_BROWSER_ENCODINGS = {
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "tis-620": "cp874",
    "shift_jis": "cp932",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "utf-16": "utf-8",
    "utf-16-le": "utf-8",
    "utf-16-be": "utf-8",
}

# As in pandoc, no empty line follows the first ---: that is a horizontal rule.
_FRONT_MATTER = re.compile(
    r"\A(?:---[ \t]*\n(?![ \t]*\n)(?:.*?\n)??(?:---|\.\.\.)|\+\+\+[ \t]*\n(?:.*?\n)??\+\+\+)[ \t]*(?:\n|\Z)", re.DOTALL
)
_FORMULA = re.compile(
    r"\$\$.+?\$\$|\$(?![\s\d$])[^$\n]*?(?<![\s\\])\$(?!\d)|\$\d[^$\n]*?[\\^_=+][^$\n]*?(?<![\s\\])\$(?!\d)"
    r"|\\\(.+?\\\)|\\\[.+?\\\]",
    re.DOTALL,
)


@dataclass(frozen=True)
class _Pages:
    """The options of HTML and Markdown."""

    paths: tuple[str, ...]
    alt: bool = False  # write an image's alternative text before it
    min_side: int = 32  # pixels; images with a shorter side (icons, trackers) are not used
    bad_images: Literal["drop", "reject"] = "drop"  # drop: count them in "dropped_images"; or reject the page
    allow_outside: bool = False  # read images outside the folder of their document, too

    def units(self) -> Sequence[Unit]:
        return file_units(self.paths)

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Return one file."""
        return ONE_FILE

    def _read(self, unit: Unit, parse: Callable[[str], BeautifulSoup]) -> Iterator[Draft | Rejected]:
        origin = shown_names(self.paths)[unit.path]
        images = ImageRules(Path(unit.path).parent, self.min_side, self.allow_outside)
        reader = BlockReader(images, self.alt, self.bad_images == "reject")
        try:
            soup = parse(unit.path)
            try:
                content = main_content(soup)
                blocks = reader.read(content)
                outside = content is not soup.body and has_text_outside(soup, content)
            except RecursionError as error:
                raise BadSample("unreadable_document", "its tags are nested too deeply") from error
            fields: dict[str, object] = {"title": title} if (title := _title(soup)) else {}
            if reader.dropped:
                fields["dropped_images"] = dict(sorted(reader.dropped.items()))
            not_read = reader.not_read + Counter({f"image: {reason}": n for reason, n in reader.dropped.items()})
            not_read["text outside the main content"] += outside
            yield replace(flow_draft(blocks, origin, **fields), items=ONE_FILE, not_read=dict(+not_read))
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail, ONE_FILE)


@dataclass(frozen=True)
class HtmlPages(_Pages):
    """HTML files. See `page_text` for their encoding."""

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the sample of a page."""
        return self._read(unit, lambda path: _soup(page_text(read_document(path))))


@dataclass(frozen=True)
class MarkdownFiles(_Pages):
    """Markdown files: CommonMark with tables and strikethrough."""

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the sample of a file."""
        for found in self._read(unit, lambda path: _soup(render_markdown(read_text(path)))):
            if isinstance(found, Draft) and _FRONT_MATTER.match(read_text(unit.path)):
                found = replace(found, not_read={**found.not_read, "front matter": 1})
            yield found


def page_text(page: bytes) -> str:
    """Decode a page by its byte order mark, else by its declared encoding, else as UTF-8. Nothing is guessed.

    Raises:
        BadSample: not_utf8, if none of these encodings fits.
    """
    page, marked = EncodingDetector.strip_byte_order_mark(page)
    declared = EncodingDetector.find_declared_encoding(page, is_html=True)
    for name in filter(None, (marked, declared, "utf-8")):
        try:
            canonical = codecs.lookup(name).name
            text = page.decode(canonical if marked else _BROWSER_ENCODINGS.get(canonical, canonical))
        except (LookupError, ValueError):  # an unknown encoding, or not that of the page
            continue
        if "\0" in text:
            raise BadSample("not_utf8", "it contains zero bytes: it is not a page, or UTF-16 without a byte order mark")
        return text
    problem = f"it declares {declared}, but is not written in it" if declared else "it declares no encoding"
    raise BadSample("not_utf8", f"{problem}, and it is not UTF-8: convert it with iconv")


def render_markdown(text: str) -> str:
    """Return Markdown as HTML, without a header in YAML or TOML."""
    return _markdown().render(_FRONT_MATTER.sub("", text, count=1))


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    """Return CommonMark with tables and strikethrough, that leaves formulas and footnotes as they are written."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    markdown.inline.ruler.before("escape", "formula", _formula)
    markdown.block.ruler.at("reference", _reference)
    return markdown


def _formula(state: StateInline, silent: bool) -> bool:
    r"""Read $x_1$, $$x_1$$, \(x_1\) or \[x_1\] as text: their underscores, stars and backslashes are not Markdown's."""
    match = _FORMULA.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        state.push("text", "", 0).content = match[0]
    state.pos = match.end()
    return True


def _reference(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Read the definition of a link, but not that of a footnote, which is text."""
    return not state.src.startswith("[^", state.bMarks[start] + state.tShift[start]) and reference(
        state, start, end, silent
    )


def _soup(html: str) -> BeautifulSoup:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML is read as browsers read it
            return BeautifulSoup(html, "lxml")
    except Exception as error:  # lxml raises many types on damaged pages
        raise BadSample("unreadable_document", f"not HTML: {error}") from error


def _title(soup: BeautifulSoup) -> str:
    return collapse_spaces(soup.title.get_text()) if soup.title else ""
