"""Multiple choice in short answers: an option is named by its letter or by its content."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rewards import choices
from rewards.plain_text import half_width, plain, trimmed

MAX_LETTERS = 500
_ANSWER_IS = re.compile(r"^(?:正确)?(?:答案|选项|选)(?:是|为)?\s*:?\s*")


def decide(given: str, wanted: str, options: Mapping[str, str]) -> bool | None:
    """Return whether an answer names the wanted option or options; None if that is not known.

    Args:
        given: The answer.
        wanted: The reference: letters, the content of an option, or both.
        options: The options by letter, if they are known.

    >>> decide("(b)", "B", {}), decide("a dog", "B", {"A": "a cat", "B": "the dog"}), decide("A", "dog", {})
    (True, True, None)
    """
    if max(len(given), len(wanted)) > MAX_LETTERS:
        return None
    right = choices.of_reference(_capital(wanted)) or _letter_of(wanted, options)
    if not right or (options and not set(right) <= set(options)):
        return None
    named = choices.letters(_capital(given))
    if not named:
        found = _letter_of(given, options)
        return found == right if found else None
    content = choices.content(trimmed(given))
    other = _letter_of(content, options) if content != trimmed(given) else ""
    return named == right and other in ("", named)


def _capital(text: str) -> str:
    """Write a letter alone as a capital: "(b)." -> "(B)". An A is no article here."""
    bare = _ANSWER_IS.sub("", half_width(text).strip(" .。\n"), count=1)
    return bare.upper() if len(bare.strip("()[]")) == 1 else bare


def _letter_of(content: str, options: Mapping[str, str]) -> str:
    """Return the letter of the option that has a content; an empty string if none has."""
    return next((letter for letter, option in options.items() if plain(option) == plain(content)), "")
