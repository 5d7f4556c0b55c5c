"""English text for the tests: a function of prose.yaml and of LICENSE, never of the machine or of Python's version."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import yaml

LICENSE = Path(__file__).parent.parent / "LICENSE"

WORDS = Path(__file__).with_name("prose.yaml")


@cache
def text() -> str:
    """Return about 80,000 characters of plain English: LICENSE, then made-up paragraphs."""
    return "\n\n".join(paragraphs())


@cache
def paragraphs() -> tuple[str, ...]:
    """Return the paragraphs of `text`: those of LICENSE on one line each, then 220 of made-up sentences."""
    license_text = LICENSE.read_text(encoding="utf-8").split("\n\n")
    return (*(" ".join(part.split()) for part in license_text if part.strip()), *_made_up(220))


def _made_up(count: int) -> Iterator[str]:
    words = yaml.safe_load(WORDS.read_text(encoding="utf-8"))
    templates = words.pop("sentences")
    choices = {kind: joined.split() for kind, joined in words.items()}
    rng = Random("prose")
    for _ in range(count):
        yield " ".join(_sentence(_pick(rng, templates), choices, rng) for _ in range(_below(rng, 3, 7)))


def _sentence(template: str, words: dict[str, list[str]], rng: Random) -> str:
    sentence = template
    for kind, choices in words.items():
        while f"{{{kind}}}" in sentence:
            sentence = sentence.replace(f"{{{kind}}}", _pick(rng, choices), 1)
    sentence = sentence.format(year=_below(rng, 1700, 2000), number=_below(rng, 2, 150), digit=_below(rng, 0, 10))
    return sentence[0].upper() + sentence[1:]


# Of Random's methods, only `random` gives the same numbers in every version of Python.


def _pick(rng: Random, choices: list[str]) -> str:
    return choices[int(rng.random() * len(choices))]


def _below(rng: Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low))
