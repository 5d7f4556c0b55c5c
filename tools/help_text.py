"""Help texts whose examples keep their lines."""

from __future__ import annotations

import inspect


def keep_lines(docstring: str | None) -> str:
    r"""Return a docstring as the help of a typer command, with the lines of indented paragraphs as they are.

    click joins the lines of a paragraph unless it begins with a line "\b".
    """
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(f"\b\n{text}" if text.startswith("    ") else text for text in paragraphs)
