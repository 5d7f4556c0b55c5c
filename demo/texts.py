"""The demo's plain text: the documentation of scikit-image's functions, read from its files without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath

from demo.media import installed_files

PACKAGE = "scikit-image"
DOCUMENT_CHARACTERS = 800  # about the length of a document; paragraphs stay whole
SENTENCE = re.compile(r"(?<=[.:] )[A-Z][^.:*|]{30,70}\.")
SUMMARY = re.compile(r"[A-Z][^*=`]{20,300}\.", re.DOTALL)


@cache
def docstrings() -> dict[str, str]:
    """Return the docstrings of the public functions, by name.

    Raises:
        DemoError: the package is not installed.
    """
    found: dict[str, str] = {}
    for name, path in sorted(installed_files(PACKAGE).items()):
        if not _is_public(PurePosixPath(name)):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and (text := ast.get_docstring(node))
            ):
                found.setdefault(node.name, text)
    return {name: text for name, text in found.items() if text}


def _is_public(path: PurePosixPath) -> bool:
    return path.suffix == ".py" and "tests" not in path.parts and not any(p.startswith("_") for p in path.parts)


def documents() -> Iterator[str]:
    """Yield the docstrings in pieces of whole paragraphs, each about DOCUMENT_CHARACTERS long."""
    for text in docstrings().values():
        piece = ""
        for paragraph in text.split("\n\n"):
            if piece and len(piece) + len(paragraph) > DOCUMENT_CHARACTERS:
                yield piece
                piece = ""
            piece += paragraph.strip("\n") + "\n\n"
        yield piece


@cache
def sentences() -> tuple[str, ...]:
    """Return the short sentences of the docstrings, each once."""
    joined = (" ".join(text.split()) for text in docstrings().values())
    return tuple(dict.fromkeys(sentence for text in joined for sentence in SENTENCE.findall(text)))


def summaries() -> dict[str, str]:
    """Return the first sentences of each function's docstring, on one line, by the function's name."""
    first = {name: text.split("\n\n")[0] for name, text in docstrings().items()}
    return {name: " ".join(text.split()) for name, text in first.items() if SUMMARY.fullmatch(text)}
