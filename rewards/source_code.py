"""Source code as sequences of tokens that say the same where the code does: never run, only parsed.

    python   the nodes of the syntax tree, so that space, comments, quotes and brackets without effect do not count
    json     one token per value with its path, so that space and the order of keys do not count
    xml      the elements with their attributes, in any order, and the texts (SVG too); it must be well-formed
    html     the same, as a browser repairs it
    text     words, numbers and signs

`tokens(code, language)` returns None for code that does not parse in its language.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lxml import etree

from rewards.plain_text import has_many_marks
from rewards.strict_json import NOT_JSON, read_json

MAX_CHARACTERS = 100_000
MAX_TOKENS = 50_000
MAX_DEPTH = 200
_FENCE = re.compile(r"\s*(`{3,}|~{3,})[^\n`]*\n(.*?)\n?\1\s*", re.DOTALL)
_WORD = re.compile(r"\w+|[^\w\s]")
_DECLARED = re.compile(r"<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)


def without_fence(code: str) -> str:
    """Return what a text holds between Markdown's fences; the text itself if it is not fenced."""
    found = _FENCE.fullmatch(code) if len(code) <= MAX_CHARACTERS else None
    return found[2] if found else code


def tokens(code: str, language: str) -> list[str] | None:
    """Return the tokens of a piece of code; None if it does not parse, or is too long."""
    if len(code) > MAX_CHARACTERS or has_many_marks(code):  # Python's parser normalises names
        return None
    result: list[str] = []
    for token in LANGUAGES[language](code):
        if token is None or len(result) >= MAX_TOKENS:
            return None
        result.append(token)
    return result


def _python(code: str) -> Iterator[str | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an answer's escapes are no concern of ours
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield None
        return
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        field, node = stack.pop()
        if not isinstance(node, ast.AST):
            yield f"{field} {node}"  # the end of a node, or None in a list
            continue
        plain_values, children = [], []
        for name, value in ast.iter_fields(node):
            if isinstance(value, (ast.AST, list)):
                children += [(name, child) for child in (value if isinstance(value, list) else [value])]
            elif name not in ("type_comment", "kind"):
                plain_values.append(f"{name}={type(value).__name__} {value!r}")
        children = [child for child in children if not isinstance(child[1], ast.expr_context)]
        yield f"{field} {type(node).__name__} {' '.join(plain_values)}{'(' if children else ''}"
        if children:
            stack.append(("", ")"))
            stack.extend(reversed(children))


def _json(code: str) -> Iterator[str | None]:
    value = read_json(code)
    if value is NOT_JSON:
        yield None
        return
    stack: list[tuple[int, int, Any]] = [(0, 0, value)]  # a hash of the path: paths may be long, and shared by many
    while stack:
        path, depth, value = stack.pop()
        if depth > MAX_DEPTH:
            yield None
            return
        if isinstance(value, dict) and value:
            stack.extend((hash((path, key)), depth + 1, value[key]) for key in sorted(value, reverse=True))
        elif isinstance(value, list) and value:
            yield f"{path} list"
            stack.extend((hash((path, 0)), depth + 1, item) for item in reversed(value))
        else:
            whole = isinstance(value, float) and value.is_integer()
            yield f"{path} {json.dumps(int(value) if whole else value)}"


def _xml(code: str) -> Iterator[str | None]:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False, remove_comments=True)
    yield from _elements(code, parser)


def _html(code: str) -> Iterator[str | None]:
    yield from _elements(code, etree.HTMLParser(no_network=True, huge_tree=False, remove_comments=True))


def _elements(code: str, parser: Any) -> Iterator[str | None]:
    """Yield the start and the end of each element, and each text without superfluous space."""
    if _DECLARED.search(code.lower().replace("<!doctype html>", "")):
        yield None
        return
    try:
        root = etree.fromstring(code.encode(), parser)
    except (etree.XMLSyntaxError, ValueError):
        root = None
    if root is None:
        yield None
        return
    for event, element in etree.iterwalk(root, events=("start", "end")):
        if not isinstance(element.tag, str):
            continue
        if event == "start":
            attributes = sorted((name, " ".join(value.split())) for name, value in element.attrib.items())
            yield f"<{element.tag} {attributes}"
        else:
            yield f"</{element.tag}"
        text = " ".join(((element.text if event == "start" else element.tail) or "").split())
        if text:
            yield text


def _text(code: str) -> Iterator[str | None]:
    yield from _WORD.findall(code)


LANGUAGES: Mapping[str, Callable[[str], Iterator[str | None]]] = {
    "python": _python,
    "json": _json,
    "xml": _xml,
    "svg": _xml,
    "html": _html,
    "text": _text,
}
