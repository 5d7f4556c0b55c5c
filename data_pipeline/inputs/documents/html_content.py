"""What part of an HTML page is content: not scripts, navigation, hidden elements or menus."""

from __future__ import annotations

import re

from bs4 import BeautifulSoup
from bs4.element import Comment, Doctype, NavigableString, ProcessingInstruction, Tag

MIN_MENU_LINKS = 5
MIN_MAIN_TEXT = 0.4  # of the page's text: an <article> with less is a teaser

# Never content, wherever they are. The first ones hold nothing that a reader sees.
_NO_TEXT = ("script", "style", "template", "head", "link", "meta", "title")
_NOT_CONTENT = (
    "noscript",
    "iframe",
    "object",
    "embed",
    "svg",
    "canvas",
    "video",
    "audio",
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
_RUBY = ("rt", "rp", "rtc")  # how the characters beside it are pronounced
# Formulas as shown by KaTeX and MathJax, beside their source.
_RENDERED_MATH = {"katex-html", "MathJax_Preview", "mwe-math-fallback-image-inline", "mwe-math-fallback-image-display"}
_MATHJAX = {"MathJax", "MathJax_Display", "MathJax_SVG", "MathJax_SVG_Display", "MathJax_CHTML", "mjx-chtml"}
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphens, places where a line may end
_MEDIA = ("iframe", "object", "embed", "svg", "canvas", "video", "audio")
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)


def main_content(soup: BeautifulSoup) -> Tag:
    """Return the element that holds a page's content.

    It is <main> or the only <article> if that holds at least MIN_MAIN_TEXT of the text, else <body>.
    """
    body = soup.body or soup
    total = len(_visible_text(body))
    mains = [*soup.find_all("main"), *(tag for tag in soup.find_all(role="main") if tag.name != "main")]
    articles = soup.find_all("article")
    for tags in (mains, articles):
        if len(tags) == 1 and len(_visible_text(tags[0])) >= MIN_MAIN_TEXT * total:
            return tags[0]
    return body


def is_hidden(tag: Tag) -> bool:
    """Return whether an element is not content: never shown, navigation, or a header or footer of the page."""
    return hidden_as(tag) is not None


def hidden_as(tag: Tag) -> str | None:
    """Return why an element is not content, as a name to count by; None if it is content; "" for no name."""
    if tag.name in _NO_TEXT:
        return None if is_tex_script(tag) else ""
    classes = set(map(str, tag.get_attribute_list("class")))
    if classes & _RENDERED_MATH or (classes & _MATHJAX and _has_tex_beside(tag)):
        return ""
    if tag.name in _RUBY:
        return "ruby text"
    name = _name_of_hidden(tag)
    return name if name is None or tag.name in _MEDIA or tag.get_text(strip=True) or tag.find("img") else ""


def _name_of_hidden(tag: Tag) -> str | None:
    if tag.name in _NOT_CONTENT:
        return f"element {tag.name}"
    if (role := str(tag.get("role", "")).lower()) in _NOT_CONTENT_ROLES:
        return f"element with role {role}"
    if tag.has_attr("hidden") or str(tag.get("aria-hidden", "")).lower() == "true":
        return "hidden element"
    # A <header> of the page is not content; a <header> within an article holds its title.
    if tag.name == "header" and tag.find_parent(["article", "main", "section"]) is None and tag.find("h1") is None:
        return "element header"
    if _HIDDEN.search(str(tag.get("style", ""))) is not None and "mwe-math" not in str(tag.get("class", "")):
        return "hidden element"
    return "list of links" if _is_menu(tag) else None


def is_tex_script(tag: Tag) -> bool:
    """Return whether an element holds a formula in TeX for MathJax."""
    return tag.name == "script" and str(tag.get("type", "")).lower().startswith("math/tex")


def _has_tex_beside(tag: Tag) -> bool:
    """Return whether the TeX source of a formula that MathJax has drawn follows it."""
    following = tag.find_next_sibling()
    return following is not None and (
        is_tex_script(following) or (bool(following.get("class")) and _has_tex_beside(following))
    )


def _is_menu(tag: Tag) -> bool:
    """Return whether an element is a list outside the main content that consists of links."""
    if tag.name not in ("ul", "ol") or tag.find_parent(["article", "main"]) is not None:
        return False
    links = tag.find_all("a")
    linked = sum(len(link.get_text(strip=True)) for link in links)
    return len(links) >= MIN_MENU_LINKS and linked > 0.9 * len(tag.get_text(strip=True))


def has_text_outside(soup: BeautifulSoup, content: Tag) -> bool:
    """Return whether a page has text outside the element that holds its content."""
    body = soup.body or soup
    return len(_visible_text(body)) > len(_visible_text(content))


def _visible_text(tag: Tag) -> str:
    if is_hidden(tag) or is_tex_script(tag):
        return ""
    parts = (_visible_text(child) if isinstance(child, Tag) else text_of(child) for child in tag.children)
    return "".join(parts).strip()


def code_of(tag: Tag) -> str:
    """Return the text of code with its line breaks and spaces, without hidden elements such as buttons."""
    parts: list[str] = []
    for child in tag.children:
        if not isinstance(child, Tag):
            parts.append(text_of(child))
        elif child.name == "br":
            parts.append("\n")
        elif not is_hidden(child):
            text = code_of(child)
            ends_line = child.name in ("div", "p", "li", "tr") and not text.endswith("\n")
            parts.append(text + "\n" * ends_line)
    return "".join(parts)


def raised(text: str, mark: str) -> str:
    """Return a superscript (mark ^) or subscript (_): ^6, _i, ^{n + 1}."""
    return mark + (text if re.fullmatch(r"[+\-−]?\w+|[^\w\s]", text) else f"{{{text}}}")


def text_of(node: object) -> str:
    """Return the text of a node that is not an element; empty for comments and declarations."""
    if isinstance(node, Comment | Doctype | ProcessingInstruction) or not isinstance(node, NavigableString):
        return ""
    return _INVISIBLE.sub("", str(node))


def collapse_spaces(text: str) -> str:
    """Return the text with runs of white space replaced by one space, and none at its ends."""
    return re.sub(r"[ \t\r\n\f\u00a0]+", " ", text).strip()
