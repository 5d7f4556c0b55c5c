"""What part of an HTML page is content: not scripts, navigation, hidden elements or menus."""

from __future__ import annotations

import re

from bs4 import BeautifulSoup
from bs4.element import Comment, Doctype, NavigableString, ProcessingInstruction, Tag

MIN_MENU_LINKS = 5
MIN_MAIN_TEXT = 0.4  # of the page's text: an <article> with less is a teaser

# Never content, wherever they are.
_NOT_CONTENT = (
    "script",
    "style",
    "noscript",
    "template",
    "head",
    "iframe",
    "object",
    "embed",
    "svg",
    "canvas",
    "nav",
    "aside",
    "form",
    "button",
    "input",
    "select",
    "textarea",
    "dialog",
    "footer",
    "menu",
)
_NOT_CONTENT_ROLES = {"navigation", "banner", "contentinfo", "search", "complementary", "menu", "dialog"}
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)


def main_content(soup: BeautifulSoup) -> Tag:
    """Return the element that holds a page's content.

    It is <main> or the only <article> if that holds at least MIN_MAIN_TEXT of the text, else <body>.
    """
    body = soup.body or soup
    total = len(_visible_text(body))
    mains = [*soup.find_all("main"), *soup.find_all(role="main")]
    articles = soup.find_all("article")
    for tags in (mains, articles):
        if len(tags) == 1 and len(_visible_text(tags[0])) >= MIN_MAIN_TEXT * total:
            return tags[0]
    return body


def is_hidden(tag: Tag) -> bool:
    """Return whether an element is not content: never shown, navigation, or a header or footer of the page."""
    if tag.name in _NOT_CONTENT or str(tag.get("role", "")).lower() in _NOT_CONTENT_ROLES:
        return True
    if tag.has_attr("hidden") or str(tag.get("aria-hidden", "")).lower() == "true":
        return True
    # A <header> of the page is not content; a <header> within an article holds its title.
    if tag.name == "header" and tag.find_parent(["article", "main", "section"]) is None and tag.find("h1") is None:
        return True
    return _HIDDEN.search(str(tag.get("style", ""))) is not None or _is_menu(tag)


def _is_menu(tag: Tag) -> bool:
    """Return whether an element is a list outside the main content that consists of links."""
    if tag.name not in ("ul", "ol") or tag.find_parent(["article", "main"]) is not None:
        return False
    links = tag.find_all("a")
    linked = sum(len(link.get_text(strip=True)) for link in links)
    return len(links) >= MIN_MENU_LINKS and linked > 0.9 * len(tag.get_text(strip=True))


def _visible_text(tag: Tag) -> str:
    if is_hidden(tag):
        return ""
    parts = (_visible_text(child) if isinstance(child, Tag) else text_of(child) for child in tag.children)
    return "".join(parts).strip()


def text_of(node: object) -> str:
    """Return the text of a node that is not an element; empty for comments and declarations."""
    if isinstance(node, Comment | Doctype | ProcessingInstruction) or not isinstance(node, NavigableString):
        return ""
    return str(node)


def collapse_spaces(text: str) -> str:
    """Return the text with runs of white space replaced by one space, and none at its ends."""
    return re.sub(r"[ \t\r\n\f\u00a0]+", " ", text).strip()
