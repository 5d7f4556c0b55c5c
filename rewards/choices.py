"""Multiple choice: the letter of an option, or its content.

of_question("Which? (A) 3 (B) 4")      {"A": "3", "B": "4"}
letters("(B)") letters("B. 4")     "B"
letters("A, C")                    "AC"
letters("4") letters("A or C")     ""
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from string import ascii_uppercase
from typing import Any

from rewards.plain_text import half_width, plain, trimmed
from rewards.verdict import RewardError

MAX_SHORT = 500  # letters of a short answer that is compared with the options

_ONE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?\s*:?\s*)?[(\[]?([A-J])[)\].:、]?", re.IGNORECASE
)
_WITH_CONTENT = re.compile(r"(?:\(([A-J])\)|([A-J])[.):、])\s*(\S.*)", re.DOTALL)
_LETTER = r"[(\[]?[A-J][)\]]?"
# a space that may belong to two parts of this pattern would take time that is exponential in the letters
_MANY = re.compile(rf"{_LETTER}(?:(?:\s*(?:,|;|and|&)\s*|\s+){_LETTER})+|[A-J]{{2,10}}")
_ALTERNATIVES = re.compile(rf"{_LETTER}(?:\s*(?:,|/|\bor\b|或)\s*{_LETTER})*\s*(?:/|\bor\b|或)\s*{_LETTER}")
_ANSWER_IS = re.compile(r"^(?:正确)?(?:答案|选项|选)(?:是|为)?\s*:?\s*")
_IN_QUESTION = re.compile(r"(?:^|[\s,;，；])(?:\(([A-J])\)|([A-J])[.):、．：])\s*")


def letters(text: str) -> str:
    """Return the letters of the options that a text names, in order and each once; "" if it names none."""
    text = text.strip()
    if len(text) > 2000:
        return ""
    if one := _ONE.fullmatch(text):
        return one[1].upper()
    if _MANY.fullmatch(text):
        return "".join(sorted(set(re.findall("[A-J]", text))))
    if with_content := _WITH_CONTENT.fullmatch(text):
        return str(with_content[1] or with_content[2])
    return ""


def alternatives(text: str) -> bool:
    """Return whether a text leaves open which option it names, as "A or C" does."""
    return len(text) <= MAX_SHORT and _ALTERNATIVES.fullmatch(text.strip()) is not None


def of_reference(text: str) -> str:
    """Return `letters` of a reference: several must be in order, so that FACE or HF are none."""
    found = letters(text)
    return found if len(found) < 2 or "".join(re.findall("[A-J]", text)) == found else ""


def content(text: str) -> str:
    """Return what stands behind the letter of an option: "4" of "B. 4", and all of a text without a letter."""
    with_content = _WITH_CONTENT.fullmatch(text.strip())
    return with_content[3] if with_content else text


@lru_cache(maxsize=1024)
def of_question(question: str) -> Mapping[str, str]:
    """Return the options that a question lists, by letter; none unless they begin with A and B."""
    marks = [(match.start(), match.end(), match[1] or match[2]) for match in _IN_QUESTION.finditer(question)]
    start = next((index for index, mark in enumerate(marks) if mark[2] == "A"), len(marks))
    marks = [mark for number, mark in enumerate(marks[start:]) if mark[2] == ascii_uppercase[number : number + 1]]
    if len(marks) < 2:
        return {}
    ends = [mark[0] for mark in marks[1:]] + [len(question)]
    return {letter: question[begin:end].strip(" ,;\n") for (_, begin, letter), end in zip(marks, ends, strict=True)}


def of_setting(given: Any) -> Mapping[str, str]:
    """Return the options of the setting `options`: a mapping of letters, or a list of texts.

    Raises:
        RewardError: It is neither.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping) and all(re.fullmatch("[A-Za-z]", str(letter)) for letter in given):
        return {str(letter).upper(): str(text) for letter, text in given.items()}
    if isinstance(given, list | tuple) and len(given) <= len(ascii_uppercase):
        return {letter: content(str(text)) for letter, text in zip(ascii_uppercase, given, strict=False)}
    raise RewardError(f"options: {given!r} is neither a list nor a mapping of letters")


def decide(given: str, wanted: str, options: Mapping[str, str]) -> bool | None:
    """Return whether an answer names the wanted option or options; None if that is not known.

    Args:
        given: The answer.
        wanted: The reference: letters, the content of an option, or both.
        options: The options by letter, if they are known.

    >>> decide("(b)", "B", {}), decide("a dog", "B", {"A": "a cat", "B": "the dog"}), decide("A", "dog", {})
    (True, True, None)
    """
    if max(len(given), len(wanted)) > MAX_SHORT:
        return None
    right = of_reference(_capital(wanted)) or _letter_of(wanted, options)
    if not right or (options and not set(right) <= set(options)):
        return None
    if alternatives(_capital(given)):
        return False
    named = letters(_capital(given))
    if not named:
        found = _letter_of(given, options)
        return found == right if found else None
    if named != right:
        return False
    behind, wanted_behind = _behind_letter(given), _behind_letter(wanted)
    if not options and behind and wanted_behind and plain(behind) != plain(wanted_behind):
        return None  # "(A) 4" for "(A) 3"
    return _letter_of(behind, options) in ("", named) if behind else True


def _behind_letter(text: str) -> str:
    """Return "4" of "B. 4", and an empty string for a text without a letter."""
    return behind if (behind := content(trimmed(text))) != trimmed(text) else ""


def _capital(text: str) -> str:
    """Write a letter alone as a capital: "(b)." -> "(B)". An A is no article here."""
    bare = _ANSWER_IS.sub("", half_width(text).strip(" .。\n"), count=1)
    return bare.upper() if len(bare.strip("()[]")) == 1 else bare


def _letter_of(text: str, options: Mapping[str, str]) -> str:
    """Return the letter of the option that has a text; an empty string if none has."""
    return next((letter for letter, option in options.items() if plain(option) == plain(text)), "")
