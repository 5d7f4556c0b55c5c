"""Filters of text: its length, repetition in it, and mixed scripts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from common.nearest import suggestion
from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Filter, Filtered, check_shares
from data_pipeline.errors import DataError

# Scripts without spaces: every character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"  # vowel signs and accents of words
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}](?:[^\W{_UNSPACED}]|[{_MARKS}])*")
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")
_PARAGRAPH = re.compile(r"\n{2,}")


def words_of(text: str) -> list[str]:
    """Return the words of a text without case and punctuation: "The cat's 2 hats, 两顶" -> the cat s 2 hats 两 顶."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def is_unspaced(character: str) -> bool:
    """Return whether a character is of a script without spaces."""
    return _UNSPACED_LETTER.match(character) is not None


@dataclass
class CaptionLength(Filter):
    """`text_too_short`, `text_too_long`: characters of the text, without spaces at its ends."""

    domains: list[str] = field(default_factory=lambda: ["image_text", "video"])
    min_characters: int = 5
    max_characters: int = 2000

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        length = len(sample.text)
        if length < self.min_characters:
            return Filtered("text_too_short", f"{length} characters: fewer than {self.min_characters}")
        if length > self.max_characters:
            return Filtered("text_too_long", f"{length} characters: more than {self.max_characters}")
        return None


@dataclass
class RepeatedText(Filter):
    """`repeated_lines`, `repeated_paragraphs`, `repeated_words`, `repeated_characters`: text that repeats itself.

    The limits on lines, paragraphs and words are Gopher's (Rae et al. 2021, table A1). Shares of characters are counted
    as in datatrove.
    """

    max_lines: float = 0.30  # share of lines that repeat an earlier one
    max_paragraphs: float = 0.30  # share of paragraphs that repeat an earlier one
    max_line_characters: float = 0.20  # share of characters in such lines
    max_paragraph_characters: float = 0.20  # share of characters in such paragraphs
    # n: share of characters in the most frequent sequence of n words
    max_top_words: dict[int, float] = field(default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16})
    # n: share of characters in sequences of n words that repeat an earlier one
    max_repeated_words: dict[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )
    max_characters: float = 0.60  # share of sequences of ten characters that repeat an earlier one
    min_words: int = 30  # shorter texts are judged by lines and characters alone: words always recur in them

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        limits = ("max_lines", "max_paragraphs", "max_line_characters", "max_paragraph_characters", "max_characters")
        check_shares("repeated_text", {option: getattr(self, option) for option in limits})
        for option in ("max_top_words", "max_repeated_words"):
            by_words: dict[int, float] = getattr(self, option)
            check_shares("repeated_text", {f"{option}[{n}]": share for n, share in by_words.items()})
            if by_words and min(by_words) < 1:
                raise DataError(f"repeated_text.{option}: a sequence of {min(by_words)} words: give 1 or more")

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        text = sample.text
        for kind, parts, limit, character_limit in (
            ("paragraphs", _PARAGRAPH.split(text), self.max_paragraphs, self.max_paragraph_characters),
            ("lines", text.splitlines(), self.max_lines, self.max_line_characters),
        ):
            parts = [part.strip() for part in parts if part.strip()]
            repeated = repeats(parts)
            if repeated and (share := len(repeated) / len(parts)) > limit:
                return Filtered(f"repeated_{kind}", f"{share:.1%} of the {kind} repeat earlier ones")
            if repeated and (share := sum(map(len, repeated)) / len(text)) > character_limit:
                detail = f"{share:.1%} of the characters are in {kind} that repeat earlier ones"
                return Filtered(f"repeated_{kind}", detail)
        words = words_of(text)
        if len(words) >= self.min_words:
            characters = sum(map(len, words))
            for n, most in self.max_top_words.items():
                share = top_share(words, n, characters)
                if share > most:
                    return Filtered("repeated_words", f"one sequence of {n} words is {share:.1%} of the text")
            for n, most in self.max_repeated_words.items():
                share = repeated_share(words, n, characters)
                if share > most:
                    return Filtered("repeated_words", f"{share:.1%} of the text repeats sequences of {n} words")
        tens = [text[start : start + 10] for start in range(len(text) - 9)]
        if tens and (share := 1 - len(set(tens)) / len(tens)) > self.max_characters:
            return Filtered("repeated_characters", f"{share:.1%} of the sequences of 10 characters repeat earlier ones")
        return None


def repeats(parts: Sequence[str]) -> list[str]:
    """Return the parts that equal an earlier one."""
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def top_share(words: Sequence[str], n: int, characters: int) -> float:
    """Return the share of characters in the most frequent sequence of n words, if it occurs more than once."""
    counts = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    most = max((sum(map(len, sequence)) * count for sequence, count in counts.items() if count > 1), default=0)
    return most / characters


def repeated_share(words: Sequence[str], n: int, characters: int) -> float:
    """Return the share of characters in sequences of n words that repeat an earlier one, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    start = repeated = 0
    while start + n <= len(words):
        sequence = tuple(words[start : start + n])
        if sequence in seen:
            repeated += sum(map(len, sequence))
            start += n
        else:
            seen.add(sequence)
            start += 1
    return repeated / characters


@dataclass
class LanguageMixing(Filter):
    """`mixed_scripts`: no script has most of the letters. `unexpected_script`: letters of scripts not in `expected`.

    The script is the first word of a letter's name in Unicode: latin, cyrillic, greek, arabic, devanagari ... Chinese
    characters, kana and bopomofo are all `cjk`, since Japanese mixes them.
    """

    min_main_share: float = 0.6  # least share of letters in the most frequent script
    expected: list[str] = field(default_factory=list)  # empty: any script
    max_unexpected: float = 0.05  # largest share of letters in other scripts
    min_letters: int = 10  # texts with fewer letters are not judged

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        shares = {"min_main_share": self.min_main_share, "max_unexpected": self.max_unexpected}
        check_shares("language_mixing", shares)
        for script in self.expected:
            if script not in known_scripts():
                hint = suggestion(script, known_scripts()) or ": give names such as latin, cjk, cyrillic"
                raise DataError(f"language_mixing.expected: {script!r} is not a script{hint}")

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        scripts = Counter(script for script in map(script_of, sample.text) if script)
        letters = scripts.total()
        if letters < self.min_letters:
            return None
        shown = ", ".join(f"{count / letters:.0%} {script}" for script, count in scripts.most_common(4))
        if scripts.most_common(1)[0][1] / letters < self.min_main_share:
            return Filtered("mixed_scripts", shown)
        if self.expected and 1 - sum(scripts[script] for script in self.expected) / letters > self.max_unexpected:
            return Filtered("unexpected_script", shown)
        return None


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """Return the script of a letter; None for other characters."""
    if not character.isalpha():
        return None
    # NFKC first: a fullwidth or mathematical A is Latin.
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "").split(" ")[0].split("-")[0]
    return _SAME_SCRIPT.get(name, name.lower()) or None


_SAME_SCRIPT = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC"), "cjk")


@lru_cache(maxsize=1)
def known_scripts() -> frozenset[str]:
    """Return the names of all scripts."""
    return frozenset(script for point in range(0x20000) if (script := script_of(chr(point)))) | {"cjk"}
