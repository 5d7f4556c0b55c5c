"""Balancing by concepts: only a share of the captions about common things is kept, and all about rare things.

The rule is MetaCLIP's (Xu et al. 2023, algorithm 1). Count how many texts contain each concept of a list. A concept in
at most `cap` texts keeps all of its samples; a more frequent one keeps a random share cap/count of them. A sample is
kept if one of its concepts keeps it, and filtered if it contains none.

    cap 2: "cat" in 4 texts, share 1/2; "ibis" in 1, share 1:  "a cat" is kept half the time, "cat and ibis" always
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
from data_pipeline.curation.filters import Filtered, RemainingSamples, SetFilter
from data_pipeline.curation.hashing import uniform
from data_pipeline.curation.texts import is_unspaced
from data_pipeline.errors import DataError


@dataclass
class ConceptBalance(SetFilter):
    """`no_concept`: the text contains none of the concepts. `common_concept`: not chosen, as described above.

    The choice is a hash of the seed, the sample's name and the concept, so it depends on no other sample.
    """

    concepts: str = ""  # a UTF-8 file, one concept per line
    cap: int = 20_000  # CLIP's; MetaCLIP used 170,000 for 2.5 billion pairs
    whole_words: bool = True  # "cat" is not in "catalogue"; has no effect in scripts without spaces
    ignore_case: bool = True
    keep_unmatched: bool = False  # keep samples without any concept
    seed: int = 0  # of the random choice
    feature_type: ClassVar = pa.list_(pa.int32())

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        if not self.concepts or not Path(self.concepts).is_file():
            raise DataError(f"concept_balance.concepts: {self.concepts!r} is not a file: write one concept per line")
        if self.cap < 1:
            raise DataError(f"concept_balance.cap is {self.cap}: give 1 or more")
        if not self.listed:
            raise DataError(f"{self.concepts} contains no concepts: write one per line")

    @cached_property
    def listed(self) -> list[str]:
        """The concepts of the file, each once, as texts are compared with them."""
        try:
            lines = Path(self.concepts).read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.concepts} is not UTF-8 ({error}): convert it with iconv") from error
        return list(dict.fromkeys(folded for line in lines if (folded := self._folded(line.strip()))))

    @cached_property
    def _automaton(self) -> ahocorasick_rs.AhoCorasick:
        return ahocorasick_rs.AhoCorasick(self.listed)

    def _folded(self, text: str) -> str:
        return " ".join((text.casefold() if self.ignore_case else text).split())

    def feature(self, sample: Candidate) -> list[int]:
        """Return the numbers of the concepts in the text, as indices of `listed`."""
        text = self._folded(sample.text)
        found = self._automaton.find_matches_as_indexes(text, overlapping=True)
        return sorted({number for number, start, end in found if not self.whole_words or _is_bounded(text, start, end)})

    def decide(self, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
        """Yield the rows to filter, with reasons."""
        counts = np.zeros(len(self.listed), np.int64)
        for _, features in samples.chunks():
            counts += np.bincount(features.flatten().to_numpy(), minlength=len(counts))
        for rows, features in samples.chunks():
            for row, concepts in zip(rows.tolist(), features.to_pylist(), strict=True):
                name = samples.name(row)
                if not concepts:
                    if not self.keep_unmatched:
                        yield row, Filtered("no_concept", "the text contains none of the concepts")
                elif not any(
                    uniform(self.seed, name, self.listed[concept]) * counts[concept] < self.cap for concept in concepts
                ):
                    rarest = min(concepts, key=lambda concept: (counts[concept], concept))
                    yield row, Filtered("common_concept", f"{self.listed[rarest]!r} is in {counts[rarest]} texts")


def _is_bounded(text: str, start: int, end: int) -> bool:
    return not (_is_inside_word(text, start) or _is_inside_word(text, end))


def _is_inside_word(text: str, offset: int) -> bool:
    """Return whether the characters on both sides of an offset belong to one word."""
    if not 0 < offset < len(text):
        return False
    before, after = text[offset - 1], text[offset]
    return before.isalnum() and after.isalnum() and not is_unspaced(before) and not is_unspaced(after)
