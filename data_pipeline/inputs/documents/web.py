"""Web pages and Markdown as interleaved samples: the main content as readable text, pictures where they stand.

    python -m tools.shard build --input site/ --out shards/site --tokenizer TOKENIZER

Both go through one walk over HTML; the text that comes of it is Markdown's without its escapes: # headings, - and 1.
lists, > quotes, | tables |, ``` code. Nothing is fetched from the network and nothing outside the given folder is read.
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.dammit import EncodingDetector
from bs4.element import Comment, Doctype, NavigableString, ProcessingInstruction, Tag
from markdown_it import MarkdownIt

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.flow import Block, file_units, flow_draft, image_media, read_document, read_text
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.references import read_reference
from data_pipeline.media.images import probe_image

SMALL = "small_image"

# What is no content of a page, wherever it stands.
_NOT_CONTENT = (
    *("script", "style", "noscript", "template", "head", "iframe", "object", "embed", "svg", "canvas"),
    *("nav", "aside", "form", "button", "input", "select", "textarea", "dialog", "footer", "menu"),
)
_NOT_CONTENT_ROLES = {"navigation", "banner", "contentinfo", "search", "complementary", "menu", "dialog"}
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
# Encodings as Python calls them -> what browsers take their names for (the WHATWG's Encoding Standard): pages that
# declare the smaller set are written in the larger one, and what declares UTF-16 in single bytes is not in it.
_MEANT = {
    **{"iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874", "shift_jis": "cp932"},
    **{"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "euc_kr": "cp949"},
    **{"utf-16": "utf-8", "utf-16-le": "utf-8", "utf-16-be": "utf-8"},
}
_BLOCKS = {
    *(
        "address",
        "article",
        "blockquote",
        "body",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
    ),
    *("figure", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "li", "main", "ol", "p", "pre", "section"),
    *("summary", "table", "ul"),
}
_HEADING = re.compile(r"h([1-6])")
_SOURCES = ("src", "data-src", "data-original", "data-lazy-src", "data-lazy")
_SOURCE_SETS = ("srcset", "data-srcset", "data-lazy-srcset")
MIN_MENU_LINKS = 5
MIN_MAIN_TEXT = 0.4  # of the page's text: an <article> with less is a teaser


@dataclass(frozen=True)
class _Pages:
    """What HTML and Markdown have in common.

    alt: write a picture's alternative text before it. min_side: smaller pictures (icons, trackers), in pixels, are
    dropped. bad_pictures: what becomes of a document with pictures that cannot be had (remote ones, missing or damaged
    files): `drop` leaves them out and counts them in the record's "dropped_images", `reject` leaves the document out.
    allow_outside: pictures may lie outside the folder of their document.
    """

    paths: tuple[str, ...]
    alt: bool = False
    min_side: int = 32
    bad_pictures: Literal["drop", "reject"] = "drop"
    allow_outside: bool = False

    def units(self) -> Sequence[Unit]:
        return file_units(self.paths)

    def _read(self, unit: Unit, soup_of: Callable[[str], BeautifulSoup]) -> Iterator[Draft | Rejected]:
        origin = shown_names(self.paths)[unit.path]
        walk = _Walk(Path(unit.path).parent, self)
        try:
            soup = soup_of(unit.path)
            try:
                blocks = walk.blocks(main_content(soup))
            except RecursionError as error:
                raise BadSample("unreadable_document", "its tags are nested too deeply") from error
            fields: dict[str, object] = {"title": title} if (title := _title(soup)) else {}
            if walk.dropped:
                fields["dropped_images"] = dict(sorted(walk.dropped.items()))
            yield flow_draft(blocks, origin, **fields)
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail)


@dataclass(frozen=True)
class HtmlPages(_Pages):
    """HTML files, see page_text for their encoding."""

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        return self._read(unit, lambda path: _soup(page_text(read_document(path))))


@dataclass(frozen=True)
class MarkdownFiles(_Pages):
    """Markdown files: CommonMark with tables and strikethrough."""

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        return self._read(unit, lambda path: _soup(render_markdown(read_text(path))))


def page_text(page: bytes) -> str:
    """A page in the encoding of its byte order mark, else in the one that it declares, else in UTF-8; never in one that
    is guessed. Raises BadSample `not_utf8` if it is in none of these."""
    page, marked = EncodingDetector.strip_byte_order_mark(page)
    declared = EncodingDetector.find_declared_encoding(page, is_html=True)
    for name in filter(None, (marked, declared, "utf-8")):
        try:
            canonical = codecs.lookup(name).name
            text = page.decode(canonical if marked else _MEANT.get(canonical, canonical))
        except (LookupError, ValueError):  # no encoding, or not the page's
            continue
        if "\0" in text:
            raise BadSample("not_utf8", "it holds zero bytes: it is no page, or one in UTF-16 without its mark")
        return text
    said = f"it declares {declared}, but is not written in it" if declared else "it declares no encoding"
    raise BadSample("not_utf8", f"{said}, and it is not UTF-8: convert it with iconv")


def render_markdown(text: str) -> str:
    """Markdown -> HTML; a YAML header is left out."""
    text = re.sub(r"\A---\n.*?\n(?:---|\.\.\.)\n", "", text, count=1, flags=re.DOTALL)
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def main_content(soup: BeautifulSoup) -> Tag:
    """Where a page's content is: <main>, or the only <article>, if most of the text stands in it; else all of it."""
    body = soup.body or soup
    whole = len(_visible_text(body))
    mains = [*soup.find_all("main"), *soup.find_all(role="main")]
    articles = soup.find_all("article")
    for tags in (mains, articles):
        if len(tags) == 1 and len(_visible_text(tags[0])) >= MIN_MAIN_TEXT * whole:
            return tags[0]
    return body


def is_hidden(tag: Tag) -> bool:
    """Whether a tag is no content: never shown, or the furniture of a page."""
    if tag.name in _NOT_CONTENT or str(tag.get("role", "")).lower() in _NOT_CONTENT_ROLES:
        return True
    if tag.has_attr("hidden") or str(tag.get("aria-hidden", "")).lower() == "true":
        return True
    # A header of the page is furniture, one within an article holds its title.
    if tag.name == "header" and tag.find_parent(["article", "main", "section"]) is None and tag.find("h1") is None:
        return True
    return _HIDDEN.search(str(tag.get("style", ""))) is not None or _is_menu(tag)


def _is_menu(tag: Tag) -> bool:
    """A list outside of the main content that holds links and little else."""
    if tag.name not in ("ul", "ol") or tag.find_parent(["article", "main"]) is not None:
        return False
    links = tag.find_all("a")
    linked = sum(len(link.get_text(strip=True)) for link in links)
    return len(links) >= MIN_MENU_LINKS and linked > 0.9 * len(tag.get_text(strip=True))


def _soup(html: str) -> BeautifulSoup:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML is read as browsers read it
            return BeautifulSoup(html, "lxml")
    except Exception as error:  # lxml raises many things on damaged pages
        raise BadSample("unreadable_document", f"not HTML: {error}") from error


def _title(soup: BeautifulSoup) -> str:
    return _clean(soup.title.get_text()) if soup.title else ""


def _visible_text(tag: Tag) -> str:
    if is_hidden(tag):
        return ""
    parts = (_visible_text(child) if isinstance(child, Tag) else _text_of(child) for child in tag.children)
    return "".join(parts).strip()


def _text_of(node: object) -> str:
    """Text that a reader sees: comments and declarations are strings too."""
    if isinstance(node, Comment | Doctype | ProcessingInstruction) or not isinstance(node, NavigableString):
        return ""
    return str(node)


def _clean(text: str) -> str:
    return re.sub(r"[ \t\r\n\f\u00a0]+", " ", text).strip()


@dataclass
class _Walk:
    """One document's way from tags to blocks. line: inline text not yet ended; dropped: pictures left out, counted by
    reason."""

    folder: Path
    options: _Pages
    out: list[Block] = field(default_factory=list)
    line: str = ""
    dropped: Counter[str] = field(default_factory=Counter)

    def blocks(self, content: Tag) -> list[Block]:
        self._children(content)
        self._end()
        return self.out

    def _end(self, prefix: str = "") -> None:
        """Ends the paragraph; line breaks within it are kept."""
        lines = [_clean(line) for line in self.line.split("\v")]
        text = "\n".join(lines).strip()
        if text:
            self.out.append(prefix + text)
        self.line = ""

    def _children(self, tag: Tag) -> None:
        for child in tag.children:
            if isinstance(child, Tag):
                if not is_hidden(child):
                    self._tag(child)
            else:
                self.line += _text_of(child)

    def _tag(self, tag: Tag) -> None:
        if tag.name in _OWN_RULES:
            _OWN_RULES[tag.name](self, tag)
        elif tag.name in _BLOCKS:
            self._end()
            self._children(tag)
            self._end()
        else:
            self._children(tag)

    def _heading(self, tag: Tag) -> None:
        self._end()
        self._children(tag)
        self._end("#" * int(tag.name[1]) + " ")

    def _break(self, _: Tag) -> None:
        self.line += "\v"

    def _rule(self, _: Tag) -> None:
        self._end()

    def _code(self, tag: Tag) -> None:
        """A block of code keeps its lines and blanks."""
        self._end()
        language = next(
            (c[9:] for part in (tag, *tag.find_all("code")) for c in _classes(part) if c[:9] == "language-"), ""
        )
        if code := tag.get_text().strip("\n"):
            self.out.append(f"```{language}\n{code}\n```")

    def _inline_code(self, tag: Tag) -> None:
        self.line += f"`{_clean(tag.get_text())}`" if tag.get_text().strip() else ""

    def _formula(self, tag: Tag) -> None:
        """MathML, in TeX if it says so itself."""
        tex = tag.find("annotation", attrs={"encoding": "application/x-tex"})
        self.line += f"${_clean(tex.get_text())}$" if tex else _clean(tag.get_text(" "))

    def _list(self, tag: Tag) -> None:
        """Items as lines of one block; a picture within ends the block and follows it."""
        self._end()
        start = str(tag.get("start", "1"))
        number = int(start) if start.isdecimal() else 1
        for item in tag.find_all("li", recursive=False):
            if is_hidden(item):
                continue
            inner = self._nested()
            for child in item.children:
                if isinstance(child, Tag) and child.name in ("ul", "ol") and not is_hidden(child):
                    inner._end()
                    inner._list(child)
                elif isinstance(child, Tag):
                    if not is_hidden(child):
                        inner._tag(child)
                else:
                    inner.line += _text_of(child)
            inner._end()
            mark = f"{number}. " if tag.name == "ol" else "- "
            self._add_marked(inner.out, mark)
            number += 1
        self.out.append("")  # ends the list's block: what follows is not its line

    def _add_marked(self, blocks: list[Block], mark: str) -> None:
        first = True
        for block in blocks:
            if isinstance(block, Media):
                self.out.append(block)
                continue
            if not block:
                continue
            lines = block.split("\n")
            indent = " " * len(mark)
            marked = "\n".join((mark if first and not i else indent) + line for i, line in enumerate(lines))
            self._add_line(marked)
            first = False

    def _add_line(self, text: str) -> None:
        """Adds to the block of the list that is being written, or begins one."""
        last = self.out[-1] if self.out else None
        if isinstance(last, str) and re.match(r"(- |\d+\. )", last):
            self.out[-1] = f"{last}\n{text}"
        else:
            self.out.append(text)

    def _quote(self, tag: Tag) -> None:
        self._end()
        inner = self._nested()
        inner._children(tag)
        inner._end()
        self.out += [_quoted(block) if isinstance(block, str) else block for block in inner.out if block]

    def _table(self, tag: Tag) -> None:
        """Rows of | cells |; pictures in it follow it. One that only places things, with text in one cell a row, is no
        table."""
        self._end()
        rows = [row for row in tag.find_all("tr") if row.find_parent("table") is tag and not is_hidden(row)]
        cells = [[cell for cell in row.find_all(["td", "th"], recursive=False) if not is_hidden(cell)] for row in rows]
        if (
            all(sum(bool(cell.get_text(strip=True)) for cell in row) < 2 for row in cells)
            or tag.find("table") is not None
        ):
            self._children(tag)
            self._end()
            return
        lines, pictures = [], []
        if caption := tag.find("caption", recursive=False):
            self._children(caption)
            self._end()
        for number, row in enumerate(cells):
            texts = []
            for cell in row:
                inner = self._nested()
                inner._children(cell)
                inner._end()
                texts.append(
                    _clean(" ".join(block for block in inner.out if isinstance(block, str))).replace("|", "\\|")
                )
                pictures += [block for block in inner.out if isinstance(block, Media)]
            lines.append(f"| {' | '.join(texts)} |")
            if number == 0 and row and all(cell.name == "th" for cell in row):
                lines.append("|" + " --- |" * len(row))
        self.out += ["\n".join(lines), *pictures]

    def _picture(self, tag: Tag) -> None:
        """An <img>: the file that it names, or the largest that its srcset or the <picture> around it offers. If that
        cannot be had, the next."""
        error: BadSample | None = None
        for reference in _references(tag):
            try:
                media = image_media(read_reference(reference, self.folder, allow_outside=self.options.allow_outside))
            except BadSample as caught:
                error = error or caught
                continue
            if min(probe_image(media.data)) < self.options.min_side:  # what stands there until the real one is loaded
                error = error or BadSample(SMALL, f"{reference[:60]}: less than {self.options.min_side} pixels")
                continue
            alt = _clean(str(tag.get("alt", "")))
            self._end()
            if self.options.alt and alt:
                self.out.append(alt)
            self.out.append(media)
            return
        if error is not None and error.reason != SMALL and self.options.bad_pictures == "reject":
            raise error
        if error is not None:
            self.dropped[error.reason] += 1

    def _nested(self) -> _Walk:
        """A walk of its own for what stands within a list's item, a quotation or a cell; it counts with this one."""
        return _Walk(self.folder, self.options, dropped=self.dropped)


_OWN_RULES: dict[str, Callable[[_Walk, Tag], None]] = {
    **{f"h{level}": _Walk._heading for level in range(1, 7)},
    "br": _Walk._break,
    "hr": _Walk._rule,
    "pre": _Walk._code,
    "code": _Walk._inline_code,
    "math": _Walk._formula,
    "ul": _Walk._list,
    "ol": _Walk._list,
    "blockquote": _Walk._quote,
    "table": _Walk._table,
    "img": _Walk._picture,
}


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.split("\n"))


def _classes(tag: Tag) -> list[str]:
    return list(tag.get_attribute_list("class"))


def _references(tag: Tag) -> list[str]:
    """What an <img> may show, best first: its src (or what pages that load late have for it), then srcset's, largest
    first."""
    direct = [str(tag[name]) for name in _SOURCES if tag.get(name)]
    around = tag.find_parent("picture")
    tags = [tag, *(around.find_all("source") if around is not None else ())]
    sets = [str(each[name]) for each in tags for name in _SOURCE_SETS if each.get(name)]
    offered = [candidate for entry in sets for candidate in parse_srcset(entry)]
    offered.sort(key=lambda pair: -pair[1])
    return [*direct, *(reference for reference, _ in offered)]


def parse_srcset(srcset: str) -> list[tuple[str, float]]:
    """`a.jpg 1x, b.jpg 2x` -> [("a.jpg", 1.0), ("b.jpg", 2.0)]: HTML's own rule, so that commas in data: URIs hold."""
    found = []
    for match in re.finditer(r"\s*,*\s*(\S*[^\s,])(?:\s+([\d.]+)[wxh])?\s*(?:,|$|(?=\s))", srcset):
        try:
            found.append((match[1], float(match[2] or 1)))
        except ValueError:
            continue
    return found
