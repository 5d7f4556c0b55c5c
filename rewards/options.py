"""Multiple choice: the options of a question, and the letter of an answer.

"Which animal? (A) a cat (B) a dog"   ->   {"A": "a cat", "B": "a dog"}
"B", "(b)", "Option B", "B. a dog"    ->   the letter B
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rewards.plain_text import half_width, plain

MAX_LETTERS = 200
MAX_QUESTION = 20_000
_MARK = re.compile(r"(?:(?<=[\s;,?。？])|^)(?:\(([A-J])\)|([A-J])[.):、])\s*")
_LETTER = re.compile(
    r"(?:(?:correct )?(?:answer|option|choice|选项|答案)(?: is|是)?[\s:]*)?"
    r"(?:[(\[]([a-j])[)\]]|([a-j])(?![\w'-]))[.):、]*(?:(?<=[.):、\]])\s*(\S.*))?",
    re.DOTALL,
)


def options_of(question: str) -> Mapping[str, str]:
    """Return the options that a question lists under A, B, ..., at least two; {} if it lists none."""
    text = half_width(question[:MAX_QUESTION])
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    found = {
        mark[1] or mark[2]: text[mark.end() : end].strip(" \n\t;,") for mark, end in zip(marks, ends, strict=False)
    }
    letters = "ABCDEFGHIJ"[: len(marks)]
    return found if len(marks) > 1 and "".join(found) == letters else {}


def letter_in(text: str) -> tuple[str, str] | None:
    """Return the letter of a short answer and what follows it; None if it does not begin with one."""
    if len(text) > MAX_LETTERS:
        return None
    found = _LETTER.fullmatch(plain(text))
    return ((found[1] or found[2]).upper(), found[3] or "") if found else None


def decide(given: str, wanted: str, question: str) -> bool | None:
    """Return whether an answer names the wanted option, by letter or by content; None if that is not known.

    >>> decide("(b)", "B", ""), decide("a dog", "B", "(A) a cat (B) a dog"), decide("A", "dog", "A. cat B. dog")
    (True, True, False)
    """
    options = options_of(question)
    wanted_letter = letter_in(wanted)
    by_letter = wanted_letter is not None and not wanted_letter[1]
    target = wanted_letter[0] if wanted_letter and by_letter else _letter_of_content(wanted, options)
    if not target or (options and target not in options):
        return None
    given_letter = letter_in(given)
    if given_letter:
        content = _letter_of_content(given_letter[1], options)
        return given_letter[0] == target and content in ("", target)
    named = _letter_of_content(given, options)
    return named == target if named else None


def _letter_of_content(content: str, options: Mapping[str, str]) -> str:
    """Return the letter of the option that has a content; an empty string if none has."""
    return (
        next((letter for letter, option in options.items() if plain(option) == plain(content)), "") if content else ""
    )
