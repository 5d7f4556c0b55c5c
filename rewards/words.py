"""Words with a fixed meaning: yes and no, numbers, hedges, what stands around an answer. English and Chinese."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

# The one table of yes and no. `right` is a side too, so a verifier of places reads it as one.
TRUTH = {
    "yes": "yes y true t correct right 是 是的 对 正确 真 有",
    "no": "no n false f incorrect wrong 否 不 不是 不对 不正确 错 错误 假 没有 无",
}
_TRUTH_OF = {word: value == "yes" for value, words in TRUTH.items() for word in words.split()}

HEDGE = re.compile(
    r"\b(?:or|about|around|approximately|approx|roughly|between|least|most|more|less|fewer|maybe|perhaps|possibly|"
    r"probably|either|nearly|almost|over|under|up to|some|any|several|not|unknown|unsure|guess|circa|ca)\b"
    r"|[~≈?？±<>≤≥+]|(?<=\d)\s*-\s*(?=\d)|(?:或|大约|大概|约|左右|可能|也许|至少|至多|最多|最少|超过|不到|多于|少于|几|到|至)",
    re.IGNORECASE,
)

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_UNITS = {word: number for number, word in enumerate(_BELOW_TWENTY.split())}
_TENFOLD = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * number for number, word in enumerate(_TENFOLD.split(), 2)}
_LARGE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SPECIAL = {"none": 0, "nothing": 0, "single": 1, "dozen": 12, "pair": 2, "couple": 2}
NUMBER_WORDS = frozenset((*_UNITS, *_TENS, *_LARGE, *_SPECIAL))

_DIGITS = {character: number for number, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "俩": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000}
_BLOCKS = {"万": 10**4, "亿": 10**8}
MAX_WORDS = 4  # of a number before a noun, as in "one hundred and five dogs"
_PARTS = {
    **{"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8},
    **{"ninth": 9, "tenth": 10, "hundredth": 100, "thousandth": 1000},
}
_FRACTION = re.compile(
    r"(?:(?P<whole>[a-z-]{3,20}) and )?(?:(?P<above>an?|[a-z]{3,9})[ -])?"
    rf"(?P<part>{'|'.join(sorted(_PARTS, key=len, reverse=True))})(?P<many>s)?\b(?: an? )?",
    re.IGNORECASE,
)
CHINESE_NUMBER = re.compile(f"[{''.join((*_DIGITS, *_PLACES, *_BLOCKS))}]+")
_CHINESE_FRACTION = re.compile(f"(?:({CHINESE_NUMBER.pattern})分之({CHINESE_NUMBER.pattern})|一半|半)(?![边径夜])")


def truth(text: str) -> bool | None:
    """Return whether a text says yes or no; None if it says neither."""
    return _TRUTH_OF.get(text.strip().rstrip(".。!！").casefold())


@lru_cache(maxsize=4096)
def english_number(text: str) -> int | None:
    """Return the number that English words say, as "twenty-one" or "a hundred and five"; None if they say none."""
    words = text.casefold().replace("-", " ").split()
    if words[:1] in (["a"], ["an"]) and len(words) > 1:
        words = words[1:] if words[1] in _SPECIAL else ["one", *words[1:]]
    if len(words) == 1 and words[0] in _SPECIAL:
        return _SPECIAL[words[0]]
    if not words or len(words) > 20 or words[0] == "and" or words[-1] == "and":
        return None
    total = part = 0
    last = 10**15  # what the next word must be below
    for word in words:
        if word == "and":
            continue
        if word in _UNITS or word in _TENS:
            number = _UNITS.get(word, _TENS.get(word, 0))
            if last not in (100, 1000, 10**6, 10**9, 10**12, 10**15) and not (20 <= last < 100 and 0 < number < 10):
                return None
            part, last = part + number, max(number, 1)
        elif word == "hundred":
            part, last = max(part, 1) * 100, 100
        elif word in _LARGE:
            total, part, last = total + max(part, 1) * _LARGE[word], 0, _LARGE[word]
        else:
            return None
    return total + part


@lru_cache(maxsize=4096)
def chinese_number(text: str) -> int | None:
    """Return the number that Chinese characters say, as 一百零五; None if they say none."""
    if not text or len(text) > 20 or not CHINESE_NUMBER.fullmatch(text):
        return None
    if all(character in _DIGITS for character in text):
        return int("".join(str(_DIGITS[character]) for character in text))
    total = block = digit = 0
    last = 10**20  # the block before, as 亿 in 一亿二千万
    for character in text:
        if character in _DIGITS:
            digit = _DIGITS[character]
        elif character in _PLACES:
            block, digit = block + (digit or 1) * _PLACES[character], 0
        else:
            size = _BLOCKS[character]
            if size > last:  # 一万亿
                total = (total + block + digit) * size
            else:
                total += (block + digit or 1) * size
            block, digit, last = 0, 0, size
    return total + block + digit


def word_number(text: str) -> int | Fraction | None:
    """Return the number that a text in English or Chinese words is; None if it is none."""
    said = english_number(text)
    said = chinese_number(text) if said is None else said
    if said is not None or (part := leading_fraction(text)) is None:
        return said
    return None if part[1] else part[0]


@lru_cache(maxsize=4096)
def leading_fraction(text: str) -> tuple[Fraction, str] | None:
    """Return the fraction that a text begins with in words, and the rest.

    >>> leading_fraction("two thirds"), leading_fraction("half an hour"), leading_fraction("一半")
    ((Fraction(2, 3), ''), (Fraction(1, 2), 'hour'), (Fraction(1, 2), ''))
    """
    if found := _CHINESE_FRACTION.match(text):
        below, above = chinese_number(found[1] or "二"), chinese_number(found[2] or "一")
        return (Fraction(above, below), text[found.end() :].strip()) if below and above is not None else None
    found = _FRACTION.match(text)
    if found is None:
        return None
    whole, above = (english_number(found[group] or "zero") for group in ("whole", "above"))
    if found["above"] is None and found["part"].casefold() != "half":
        return None  # "third" is an ordinal
    if (found["above"] or "a").casefold() in ("a", "an"):
        above = 1
    if whole is None or not above or (above > 1) != (found["many"] is not None):
        return None  # "twenty fifth" is an ordinal
    return whole + Fraction(above, _PARTS[found["part"].casefold()]), text[found.end() :].strip()


def leading_number(text: str) -> tuple[int | Fraction | None, str]:
    """Return the number that a text begins with in words, and the rest: (3, "dogs") of "three dogs"."""
    if (part := leading_fraction(text)) is not None:
        return part
    if found := CHINESE_NUMBER.match(text):
        return chinese_number(found[0]), text[found.end() :].strip()
    words = text.split()
    for count in range(min(MAX_WORDS, len(words)), 0, -1):
        if (number := english_number(" ".join(words[:count]))) is not None:
            return number, " ".join(words[count:])
    return None, ""
