"""Write the page that shows samples and packs: one file without scripts or external links."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.files import write_text
from tools.view_content import PackView

# Characters of a sample that a page cannot hold or would hide: control characters, characters that change the direction
# of text, halves of surrogate pairs. They are shown as \u202e.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown_text(text: str) -> str:
    """Return a text with the characters that nobody would see written as escapes."""
    return _UNSEEN.sub(_escaped, text)


def write_page(out: Path, title: str, packs: Sequence[PackView]) -> int:
    """Write the page and return its number of characters."""
    # All text of a sample comes from outside: the template escapes all of it.
    pages = Environment(loader=PackageLoader("tools", "."), autoescape=True, undefined=StrictUndefined)
    page = shown_text(pages.get_template("view_page.html").render(title=title, packs=packs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return len(page)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
