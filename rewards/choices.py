"""Multiple choice: the letter of an option, or its content.

of_question("Which? (A) 3 (B) 4")      {"A": "3", "B": "4"}
letters("(B)") letters("B. 4")     "B"
letters("A, C")                    "AC"
letters("4") letters("A or C")     ""
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any, TypeAlias

from rewards.plain_text import half_width
from rewards.verdict import Ask, Outcome, RewardError, Verdict

Same: TypeAlias = Callable[[str, str], bool]

MAX_SHORT_CHARACTERS = 500  # of a short answer, which is compared with the options
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
_NUMERIC = re.compile(r"[-+$€£¥]?\s*\.?\d")

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
    return len(text) <= MAX_SHORT_CHARACTERS and _ALTERNATIVES.fullmatch(text.strip()) is not None


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


def decide(given: str, wanted: str, options: Mapping[str, str], same: Same) -> Outcome | None:
    """Decide multiple choice, both ways; None if the reference is no option.

    Args:
        given: The answer.
        wanted: The reference: letters, the content of an option, or both.
        options: The options by letter, if they are known.
        same: Whether two contents are the same, by the rules of the verifier.

    An answer of letters must name the right ones, and what stands behind its letter must not contradict it. An answer
    without letters is compared with the contents that are known: those of the options, or that of the reference.
    """
    if max(len(given), len(wanted)) > MAX_SHORT_CHARACTERS:
        return None
    wanted_content = content(wanted)
    right = by_letter = of_reference(wanted)
    if not right:
        right = next((letter for letter, text in options.items() if same(wanted, text)), "")
    if not right:
        return None
    if not set(right) <= set(options):
        options = NO_OPTIONS  # the question lists something else
    if alternatives(given):
        return Verdict(0.0, "hedged")
    if named := letters(given):
        own = options.get(named) or (wanted_content if wanted_content != wanted else "")
        return _lettered(given, named == right, own, options.values(), same)
    if fitting := [letter for letter, text in options.items() if same(given, text)]:
        return Verdict(float(fitting == [right]), "option_content")
    if by_letter and wanted_content != wanted and same(given, wanted_content):  # "4" for "(B) 4"
        return Verdict(1.0, "option_content")
    return Ask("option") if by_letter else None


def _lettered(given: str, right: bool, own: str, contents: Collection[str], same: Same) -> Outcome:
    """Decide an answer that names a letter. `own` is the content of that option, if it is known."""
    said = content(given)
    if not right or said == given or not own or same(said, own):
        return Verdict(float(right), "option")
    if any(same(said, text) for text in contents) or _NUMERIC.match(said):
        return Verdict(0.0, "option")
    return Ask("option")


def capital(text: str) -> str:
    """Write a letter alone as a capital: "(b)." -> "(B)". An A is no article here."""
    bare = _ANSWER_IS.sub("", half_width(text).strip(" .。\n"), count=1)
    return bare.upper() if len(bare.strip("()[]")) == 1 else bare
