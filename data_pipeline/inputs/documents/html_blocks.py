"""HTML as blocks: paragraphs in Markdown's form, and images between them.

The text is Markdown without escapes: # headings, - and 1. lists, > quotes, | tables |, ``` code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bs4.element import Tag

from data_pipeline.errors import BadSample
from data_pipeline.inputs.documents.html_content import collapse_spaces, is_hidden, text_of
from data_pipeline.inputs.documents.html_images import SMALL_IMAGE, ImageRules, find_image
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.flow import Block

_BLOCK_TAGS = {
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
    "figure",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "header",
    "hr",
    "html",
    "li",
    "main",
    "ol",
    "p",
    "pre",
    "section",
    "summary",
    "table",
    "ul",
}


@dataclass
class BlockReader:
    """Reads one document's elements in order and collects blocks."""

    images: ImageRules
    alt: bool = False  # write an image's alternative text before it
    reject_bad_images: bool = False  # an image that cannot be read rejects the document
    out: list[Block] = field(default_factory=list)
    line: str = ""  # inline text of the paragraph that has not ended; \v is a line break
    skipped: Counter[str] = field(default_factory=Counter)  # skipped images by reason

    def read(self, content: Tag) -> list[Block]:
        """Return the blocks of an element.

        Raises:
            BadSample: An image cannot be read, and `reject_bad_images` is set.
            RecursionError: The elements are nested too deeply.
        """
        self._children(content)
        self._end()
        return self.out

    def _end(self, prefix: str = "") -> None:
        """End the paragraph. Line breaks within it are kept."""
        lines = [collapse_spaces(line) for line in self.line.split("\v")]
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
                self.line += text_of(child)

    def _tag(self, tag: Tag) -> None:
        if tag.name in _READERS:
            _READERS[tag.name](self, tag)
        elif tag.name in _BLOCK_TAGS:
            self._end()
            self._children(tag)
            self._end()
        else:
            self._children(tag)

    def _heading(self, tag: Tag) -> None:
        self._end()
        self._children(tag)
        self._end("#" * int(tag.name[1]) + " ")

    def _line_break(self, _: Tag) -> None:
        self.line += "\v"

    def _horizontal_rule(self, _: Tag) -> None:
        self._end()

    def _code(self, tag: Tag) -> None:
        """Add a code block with its line breaks and spaces."""
        self._end()
        language = next(
            (c[9:] for part in (tag, *tag.find_all("code")) for c in _classes(part) if c[:9] == "language-"), ""
        )
        if code := tag.get_text().strip("\n"):
            self.out.append(f"```{language}\n{code}\n```")

    def _inline_code(self, tag: Tag) -> None:
        self.line += f"`{collapse_spaces(tag.get_text())}`" if tag.get_text().strip() else ""

    def _formula(self, tag: Tag) -> None:
        """Add MathML as TeX if it contains its TeX source, else as text."""
        tex = tag.find("annotation", attrs={"encoding": "application/x-tex"})
        self.line += f"${collapse_spaces(tex.get_text())}$" if tex else collapse_spaces(tag.get_text(" "))

    def _list(self, tag: Tag) -> None:
        """Add the items as lines of one block. An image within an item ends the block and follows it."""
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
                    inner.line += text_of(child)
            inner._end()
            marker = f"{number}. " if tag.name == "ol" else "- "
            self._add_item(inner.out, marker)
            number += 1
        self.out.append("")  # ends the list's block: what follows is not one of its lines

    def _add_item(self, blocks: list[Block], marker: str) -> None:
        """Add the blocks of a list item, the first line with its marker and the others indented."""
        first = True
        for block in blocks:
            if isinstance(block, Media):
                self.out.append(block)
                continue
            if not block:
                continue
            lines = block.split("\n")
            indent = " " * len(marker)
            self._add_list_lines(
                "\n".join((marker if first and not i else indent) + line for i, line in enumerate(lines))
            )
            first = False

    def _add_list_lines(self, text: str) -> None:
        """Add lines to the block of the current list, or begin one."""
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
        """Add rows of | cells |, then the images of the table. A table that is used for layout is read as text."""
        self._end()
        rows = [row for row in tag.find_all("tr") if row.find_parent("table") is tag and not is_hidden(row)]
        cells = [[cell for cell in row.find_all(["td", "th"], recursive=False) if not is_hidden(cell)] for row in rows]
        if _is_layout_table(tag, cells):
            self._children(tag)
            self._end()
            return
        if caption := tag.find("caption", recursive=False):
            self._children(caption)
            self._end()
        lines: list[str] = []
        images: list[Block] = []
        for number, row in enumerate(cells):
            texts = []
            for cell in row:
                inner = self._nested()
                inner._children(cell)
                inner._end()
                text = collapse_spaces(" ".join(block for block in inner.out if isinstance(block, str)))
                texts.append(text.replace("|", "\\|"))
                images += [block for block in inner.out if isinstance(block, Media)]
            lines.append(f"| {' | '.join(texts)} |")
            if number == 0 and row and all(cell.name == "th" for cell in row):
                lines.append("|" + " --- |" * len(row))
        self.out += ["\n".join(lines), *images]

    def _image(self, tag: Tag) -> None:
        try:
            media = find_image(tag, self.images)
        except BadSample as error:
            if self.reject_bad_images and error.reason != SMALL_IMAGE:
                raise
            self.skipped[error.reason] += 1
            return
        if media is None:
            return
        alt = collapse_spaces(str(tag.get("alt", "")))
        self._end()
        if self.alt and alt:
            self.out.append(alt)
        self.out.append(media)

    def _nested(self) -> BlockReader:
        """Return a reader for a list item, a quotation or a cell. It counts skipped images with this one."""
        return BlockReader(self.images, self.alt, self.reject_bad_images, skipped=self.skipped)


_READERS: dict[str, Callable[[BlockReader, Tag], None]] = {
    **{f"h{level}": BlockReader._heading for level in range(1, 7)},
    "br": BlockReader._line_break,
    "hr": BlockReader._horizontal_rule,
    "pre": BlockReader._code,
    "code": BlockReader._inline_code,
    "math": BlockReader._formula,
    "ul": BlockReader._list,
    "ol": BlockReader._list,
    "blockquote": BlockReader._quote,
    "table": BlockReader._table,
    "img": BlockReader._image,
}


def _is_layout_table(table: Tag, cells: list[list[Tag]]) -> bool:
    """Return whether a table only positions its content: no row has text in two cells, or it contains a table."""
    return (
        all(sum(bool(cell.get_text(strip=True)) for cell in row) < 2 for row in cells)
        or table.find("table") is not None
    )


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.split("\n"))


def _classes(tag: Tag) -> list[str]:
    return list(tag.get_attribute_list("class"))
