"""Filters of text: its length, repetition within it, and scripts that do not belong together."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.errors import DataError

# Scripts written without spaces: every letter counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"  # vowel signs and accents of words
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}](?:[^\W{_UNSPACED}]|[{_MARKS}])*")
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")
_PARAGRAPH = re.compile(r"\n{2,}")


def words_of(text: str) -> list[str]:
    """Its words, case and punctuation kept out of sight: "The cat's 2 hats, 两顶" -> the cat s 2 hats 两 顶."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def is_unspaced(character: str) -> bool:
    """Whether it is of a script written without spaces."""
    return _UNSPACED_LETTER.match(character) is not None


@dataclass
class CaptionLength(Filter):
    """`text_too_short`, `text_too_long`: characters of a caption, spaces at its ends not counted."""

    domains: list[str] = field(default_factory=lambda: ["image_text", "video"])
    min_characters: int = 5
    max_characters: int = 2000

    def __call__(self, sample: Candidate) -> Drop | None:
        length = len(sample.text)
        if length < self.min_characters:
            return Drop("text_too_short", f"{length} characters: fewer than {self.min_characters}")
        if length > self.max_characters:
            return Drop("text_too_long", f"{length} characters: more than {self.max_characters}")
        return None


@dataclass
class RepeatedText(Filter):
    """`repeated_lines`, `repeated_paragraphs`, `repeated_words`, `repeated_characters`: text that says one thing again
    and again. The limits on lines, paragraphs and words are Gopher's (Rae et al. 2021, table A1), where shares of
    characters are counted as datatrove counts them; shares of `characters` are of all runs of ten characters.
    """

    max_lines: float = 0.30  # share of lines that repeat an earlier one
    max_paragraphs: float = 0.30
    max_line_characters: float = 0.20  # share of characters in such lines
    max_paragraph_characters: float = 0.20
    # n: share of characters that the most frequent run of n words may take
    max_top_words: dict[int, float] = field(default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16})
    # n: share of characters in runs of n words that stood before
    max_repeated_words: dict[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )
    max_characters: float = 0.60  # share of runs of ten characters that stood before
    min_words: int = 30  # in shorter texts words recur by nature: they are judged by lines and characters alone

    def __call__(self, sample: Candidate) -> Drop | None:
        text = sample.text
        for kind, parts, limit, character_limit in (
            ("paragraphs", _PARAGRAPH.split(text), self.max_paragraphs, self.max_paragraph_characters),
            ("lines", text.splitlines(), self.max_lines, self.max_line_characters),
        ):
            parts = [part.strip() for part in parts if part.strip()]
            again = repeats(parts)
            if again and (share := len(again) / len(parts)) > limit:
                return Drop(f"repeated_{kind}", f"{share:.1%} of the {kind} repeat earlier ones")
            if again and (share := sum(map(len, again)) / len(text)) > character_limit:
                return Drop(f"repeated_{kind}", f"{share:.1%} of the characters are in {kind} that repeat earlier ones")
        words = words_of(text)
        if len(words) >= self.min_words:
            characters = sum(map(len, words))
            for n, most in self.max_top_words.items():
                share = top_share(words, n, characters)
                if share > most:
                    return Drop("repeated_words", f"one run of {n} words makes {share:.1%} of the text")
            for n, most in self.max_repeated_words.items():
                share = repeated_share(words, n, characters)
                if share > most:
                    return Drop("repeated_words", f"{share:.1%} of the text repeats runs of {n} words")
        runs = [text[start : start + 10] for start in range(len(text) - 9)]
        if runs and (share := 1 - len(set(runs)) / len(runs)) > self.max_characters:
            return Drop("repeated_characters", f"{share:.1%} of its runs of 10 characters stood before")
        return None


def repeats(parts: Sequence[str]) -> list[str]:
    """Those that equal an earlier one."""
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def top_share(words: Sequence[str], n: int, characters: int) -> float:
    """Share of characters in the most frequent run of n words, if it occurs more than once."""
    counts = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return max((sum(map(len, run)) * count for run, count in counts.items() if count > 1), default=0) / characters


def repeated_share(words: Sequence[str], n: int, characters: int) -> float:
    """Share of characters in runs of n words that stood before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    start = repeated = 0
    while start + n <= len(words):
        run = tuple(words[start : start + n])
        if run in seen:
            repeated += sum(map(len, run))
            start += n
        else:
            seen.add(run)
            start += 1
    return repeated / characters


@dataclass
class LanguageMixing(Filter):
    """`mixed_scripts`: no script has most of the letters. `unexpected_script`: letters of scripts not `expected`.

    Scripts are told by the names of letters in Unicode: latin, cyrillic, greek, arabic, devanagari ...; Chinese
    characters, kana and bopomofo are all `cjk`, since Japanese mixes them.
    """

    min_main_share: float = 0.6  # of the letters are of one script
    expected: list[str] = field(default_factory=list)  # empty: any script
    max_unexpected: float = 0.05  # share of letters of other scripts
    min_letters: int = 10  # fewer say nothing

    def check(self) -> None:
        for script in self.expected:
            if script not in known_scripts():
                near = difflib.get_close_matches(script, known_scripts(), 1)
                mend = f"did you mean {near[0]!r}?" if near else "give names such as latin, cjk, cyrillic"
                raise DataError(f"language_mixing.expected: {script!r} is no script: {mend}")

    def __call__(self, sample: Candidate) -> Drop | None:
        scripts = Counter(script for script in map(script_of, sample.text) if script)
        letters = scripts.total()
        if letters < self.min_letters:
            return None
        shown = ", ".join(f"{count / letters:.0%} {script}" for script, count in scripts.most_common(4))
        if scripts.most_common(1)[0][1] / letters < self.min_main_share:
            return Drop("mixed_scripts", shown)
        if self.expected and 1 - sum(scripts[script] for script in self.expected) / letters > self.max_unexpected:
            return Drop("unexpected_script", shown)
        return None


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """The script of a letter; None for all else."""
    if not character.isalpha():
        return None
    # NFKC first: a fullwidth or mathematical A is a Latin one.
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "").split(" ")[0].split("-")[0]
    return _SAME_SCRIPT.get(name, name.lower()) or None


_SAME_SCRIPT = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC"), "cjk")


@lru_cache(maxsize=1)
def known_scripts() -> frozenset[str]:
    return frozenset(script for point in range(0x20000) if (script := script_of(chr(point)))) | {"cjk"}
