"""Balancing by concepts: captions about common things are thinned out, those about rare ones stay.

The rule is MetaCLIP's (Xu et al. 2023, algorithm 1): with a list of concepts, count how many texts hold each. One found
`cap` times at most keeps all of its samples; one found more often keeps a share cap/count of them, drawn for every
concept that a text holds. A sample stays if one of its concepts keeps it, and goes if it holds none.

    cap 2: "cat" in 4 texts, share 1/2; "ibis" in 1, share 1:  "a cat" stays half the time, "cat and ibis" for certain
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import ahocorasick_rs
import numpy as np
import pyarrow as pa

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, SetFilter, Survivors
from data_pipeline.curation.hashing import uniform
from data_pipeline.curation.texts import is_unspaced
from data_pipeline.errors import DataError


@dataclass
class ConceptBalance(SetFilter):
    """`no_concept`: the text holds none of the listed concepts. `common_concept`: drawn out, as described above.

    The draw is a hash of the seed, the sample's name and the concept, so it depends on no other sample.
    """

    concepts: str = ""  # a UTF-8 file, a concept a line
    cap: int = 20_000  # CLIP's; MetaCLIP took 170,000 for 2.5 billion pairs
    whole_words: bool = True  # "cat" is not in "catalogue"; scripts without spaces have no such bounds
    ignore_case: bool = True
    keep_unmatched: bool = False
    seed: int = 0
    feature_type: ClassVar = pa.list_(pa.int32())

    def check(self) -> None:
        if not self.concepts or not Path(self.concepts).is_file():
            raise DataError(f"concept_balance.concepts: {self.concepts!r} is no file: give one with a concept a line")
        if self.cap < 1:
            raise DataError(f"concept_balance.cap is {self.cap}: give 1 or more")
        if not self._listed:
            raise DataError(f"{self.concepts} lists no concepts: give one a line")

    @cached_property
    def _listed(self) -> list[str]:
        try:
            lines = Path(self.concepts).read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.concepts} is not UTF-8 ({error}): save it so") from error
        return list(dict.fromkeys(folded for line in lines if (folded := self._folded(line.strip()))))

    @cached_property
    def _automaton(self) -> ahocorasick_rs.AhoCorasick:
        return ahocorasick_rs.AhoCorasick(self._listed)

    def _folded(self, text: str) -> str:
        return " ".join((text.casefold() if self.ignore_case else text).split())

    def feature(self, sample: Candidate) -> list[int]:
        """The numbers of the concepts in its text."""
        text = self._folded(sample.text)
        found = self._automaton.find_matches_as_indexes(text, overlapping=True)
        return sorted({concept for concept, start, end in found if not self.whole_words or _bounded(text, start, end)})

    def decide(self, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
        counts = np.zeros(len(self._listed), np.int64)
        for _, features in survivors.chunks():
            counts += np.bincount(features.flatten().to_numpy(), minlength=len(counts))
        for rows, features in survivors.chunks():
            for row, concepts in zip(rows.tolist(), features.to_pylist(), strict=True):
                name = survivors.name(row)
                if not concepts:
                    if not self.keep_unmatched:
                        yield row, Drop("no_concept", "none of the listed concepts is in its text")
                elif not any(
                    uniform(self.seed, name, self._listed[concept]) * counts[concept] < self.cap for concept in concepts
                ):
                    rarest = min(concepts, key=lambda concept: (counts[concept], concept))
                    yield row, Drop("common_concept", f"{self._listed[rarest]!r} is in {counts[rarest]} texts")


def _bounded(text: str, start: int, end: int) -> bool:
    return not (_joined(text, start) or _joined(text, end))


def _joined(text: str, place: int) -> bool:
    """Whether the characters on both sides of a place belong to one word."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    return before.isalnum() and after.isalnum() and not is_unspaced(before) and not is_unspaced(after)
