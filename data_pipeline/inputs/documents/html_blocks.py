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
from data_pipeline.inputs.documents.html_content import code_of, collapse_spaces, hidden_as, is_hidden, raised, text_of
from data_pipeline.inputs.documents.html_images import SMALL_IMAGE, ImageRules, find_image, references
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

_ORDINALS = {"st", "nd", "rd", "er", "re", "ère", "e", "ème", "o", "a"}  # after a digit
_SIGNS = {"th", "º", "ª", "tm", "sm", "®", "™", "©", "℠", "*", "†", "‡"}
_TEX_IMAGES = {"latex", "tex", "mathtex-equation-editor"}  # of images whose alternative text is their formula
_TEX_ENCODING = re.compile("^(application/x-tex|TeX|LaTeX)$", re.IGNORECASE)
MAX_SPAN = 200  # columns or rows of a cell


@dataclass
class BlockReader:
    """Reads one document's elements in order and collects blocks."""

    images: ImageRules
    alt: bool = False  # write an image's alternative text before it
    reject_bad_images: bool = False  # an image that cannot be read rejects the document
    out: list[Block] = field(default_factory=list)
    line: str = ""  # inline text of the paragraph that has not ended; \v is a line break
    dropped: Counter[str] = field(default_factory=Counter)  # images that are not used, by reason
    not_read: Counter[str] = field(default_factory=Counter)  # elements that are not read, by name
    last_image: set[str] = field(default_factory=set)  # what the <img> of the last image offered

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
            self._node(child)

    def _node(self, node: object) -> None:
        """Read an element or text, or count an element that is not read."""
        if not isinstance(node, Tag):
            self.line += text_of(node)
        elif node.name == "noscript":
            self._no_script(node)
        elif (hidden := hidden_as(node)) is None:
            self._tag(node)
        elif hidden:
            self.not_read[hidden] += 1
            if node.name == "embed":  # it has no end tag: the parser puts what follows into it
                self._children(node)

    def _no_script(self, tag: Tag) -> None:
        """Read the images for browsers without scripts, unless the <img> before them offers the same."""
        for image in tag.find_all("img"):
            if not self.last_image & set(references(image)):
                self._image(image)
        if tag.get_text(strip=True):
            self.not_read["element noscript"] += 1

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
        if code := code_of(tag).strip("\n"):
            self.out.append(f"```{language}\n{code}\n```")

    def _inline_code(self, tag: Tag) -> None:
        code = collapse_spaces(code_of(tag))
        self.line += f"`{code}`" if code else ""

    def _formula(self, tag: Tag) -> None:
        """Add MathML as TeX if it contains its TeX source, else as text."""
        source = tag.find("annotation", attrs={"encoding": _TEX_ENCODING})
        tex = collapse_spaces(source.get_text() if source else str(tag.get("alttext", "")))
        self.line += f"${_plain_tex(tex)}$" if tex else collapse_spaces(tag.get_text(" "))

    def _script(self, tag: Tag) -> None:
        """Add a formula of MathJax."""
        self.line += f"${collapse_spaces(tag.get_text())}$"

    def _raised(self, tag: Tag) -> None:
        """Add a superscript or subscript: 10^6, H_2O, x^{n+1}; a reference to a note as [1], an ordinal as 1st."""
        inner = self._nested()
        inner._children(tag)
        inner._end()
        text = " ".join(block for block in inner.out if isinstance(block, str))
        link = tag.find("a", href=re.compile("^#"))
        if not text:
            pass
        elif tag.name == "sup" and (link is not None or re.fullmatch(r"\[.*\]", text)):
            self.line += text if text.startswith("[") else f"[{text}]"
        elif tag.name == "sup" and (
            text.lower() in _SIGNS or (text.lower() in _ORDINALS and self.line.rstrip()[-1:].isdigit())
        ):
            self.line += text
        elif re.fullmatch(r"[^\W\d]{2,}([\s,]+[^\W\d]+)+", text) or (text.isalpha() and not self.line.strip()):
            self.line += text  # a remark in small letters
        else:
            self.line += raised(text, "^" if tag.name == "sup" else "_")
        self._add_images(inner)

    def _quotation(self, tag: Tag) -> None:
        self.line += "“"
        self._children(tag)
        self.line += "”"

    def _add_images(self, inner: BlockReader) -> None:
        if images := [block for block in inner.out if isinstance(block, Media)]:
            self._end()
            self.out += images

    def _list(self, tag: Tag) -> None:
        """Add the items as lines of one block. An image within an item ends the block and follows it.

        What stands between items, such as a list directly in a list, continues the item before it.
        """
        self._end()
        number = _number(tag.get("start"), 1)
        marker = "- " if tag.name == "ul" else f"{number}. "
        for item in tag.children:
            if isinstance(item, Tag) and is_hidden(item):
                self._node(item)
                continue
            inner = self._nested()
            is_item = isinstance(item, Tag) and item.name == "li"
            if isinstance(item, Tag) and is_item:
                number = _number(item.get("value"), number)
                marker = f"{number}. " if tag.name == "ol" else "- "
                number += 1
                inner._children(item)
            else:
                inner._node(item)
            inner._end()
            self._add_item(inner.out, marker, marked=is_item)
        self.out.append("")  # ends the list's block: what follows is not one of its lines

    def _add_item(self, blocks: list[Block], marker: str, *, marked: bool = True) -> None:
        """Add the blocks of a list item, the first line with its marker (if it is `marked`) and the others indented."""
        first = marked
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
        all_rows = [row for row in tag.find_all("tr") if row.find_parent("table") is tag]
        rows = [row for row in all_rows if not is_hidden(row)]
        all_cells = [row.find_all(["td", "th"], recursive=False) for row in rows]
        cells = [[cell for cell in row if not is_hidden(cell)] for row in all_cells]
        if _is_layout_table(tag, cells):
            self._children(tag)
            self._end()
            return
        for hidden in filter(is_hidden, (*all_rows, *(cell for row in all_cells for cell in row))):
            self._node(hidden)  # counts it
        if caption := tag.find("caption", recursive=False):
            self._children(caption)
            self._end()
        texts: dict[Tag, str] = {}
        images: list[Block] = []
        for cell in (cell for row in cells for cell in row):
            inner = self._nested()
            inner._children(cell)
            inner._end()
            text = collapse_spaces(" ".join(block for block in inner.out if isinstance(block, str)))
            texts[cell] = text.replace("|", "\\|")
            images += [block for block in inner.out if isinstance(block, Media)]
        grid = _table_grid(cells)
        lines = [f"| {' | '.join(texts[cell] if cell is not None else '' for cell in row)} |" for row in grid]
        if cells and cells[0] and all(cell.name == "th" for cell in cells[0]):
            lines.insert(1, "|" + " --- |" * len(grid[0]))
        self.out += ["\n".join(lines), *images]

    def _image(self, tag: Tag) -> None:
        if _TEX_IMAGES & set(_classes(tag)) and (tex := collapse_spaces(str(tag.get("alt", "")))):
            self.line += f"${_plain_tex(tex)}$"
            return
        try:
            media = find_image(tag, self.images)
        except BadSample as error:
            if self.reject_bad_images and error.reason != SMALL_IMAGE:
                raise
            self.dropped[error.reason] += 1
            return
        if media is None:
            return
        self.last_image.clear()
        self.last_image.update(references(tag))
        alt = collapse_spaces(str(tag.get("alt", "")))
        self._end()
        if self.alt and alt:
            self.out.append(alt)
        self.out.append(media)

    def _nested(self) -> BlockReader:
        """Return a reader for a list item, a quotation or a cell. It counts what is not read with this one."""
        return BlockReader(
            self.images,
            self.alt,
            self.reject_bad_images,
            dropped=self.dropped,
            not_read=self.not_read,
            last_image=self.last_image,
        )


_READERS: dict[str, Callable[[BlockReader, Tag], None]] = {
    **{f"h{level}": BlockReader._heading for level in range(1, 7)},
    "br": BlockReader._line_break,
    "hr": BlockReader._horizontal_rule,
    "pre": BlockReader._code,
    "code": BlockReader._inline_code,
    "math": BlockReader._formula,
    "script": BlockReader._script,
    "sup": BlockReader._raised,
    "sub": BlockReader._raised,
    "q": BlockReader._quotation,
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


def _table_grid(rows: list[list[Tag]]) -> list[list[Tag | None]]:
    """Return the cells of a table by row and column. A place that a wider or higher cell covers is None."""
    grid: list[dict[int, Tag | None]] = [{} for _ in rows]
    for number, row in enumerate(rows):
        column = 0
        for cell in row:
            while column in grid[number]:
                column += 1
            width, height = max(_span(cell, "colspan"), 1), _span(cell, "rowspan") or len(rows)
            for below in grid[number : number + height]:
                for place in range(column, column + width):
                    below.setdefault(place, None)
            grid[number][column] = cell
            column += width
    columns = 1 + max((place for row in grid for place in row), default=-1)
    return [[row.get(place) for place in range(columns)] for row in grid]


def _span(cell: Tag, name: str) -> int:
    """Return how many columns or rows a cell covers; 0 stands for all."""
    return min(_number(cell.get(name), 1), MAX_SPAN)


def _number(value: object, default: int) -> int:
    """Return the number of an attribute, or the default if it is none."""
    written = str(value).strip()
    return int(written[:9]) if written.isdecimal() else default


def _plain_tex(tex: str) -> str:
    r"""Return TeX without the {\displaystyle ...} around Wikipedia's formulas, and without its own dollars."""
    if match := re.fullmatch(r"\{\\(?:displaystyle|textstyle) (.*)\}", tex):
        tex = match[1].strip()
    return tex.strip("$ ")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.split("\n"))


def _classes(tag: Tag) -> list[str]:
    return list(tag.get_attribute_list("class"))
