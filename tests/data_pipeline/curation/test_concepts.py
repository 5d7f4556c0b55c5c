"""Balancing by concepts, compared with the rule in plain code, and matching, compared with regular expressions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.curation.concepts import ConceptBalance
from data_pipeline.curation.hashing import uniform
from data_pipeline.errors import DataError
from tests.data_pipeline.curation.samples import candidate, filtered

pytestmark = pytest.mark.fast

CONCEPTS = ["cat", "dog", "ibis", "hot dog", "C++", "猫", "窗边", "Café"]


@pytest.fixture
def listed(tmp_path: Path) -> str:
    path = tmp_path / "concepts.txt"
    path.write_text(
        "\n".join([*CONCEPTS, "", "cat"]) + "\n", "utf-8-sig"
    )  # with a byte order mark, as some editors write it
    return str(path)


def matches(step: ConceptBalance, text: str) -> list[str]:
    return [step.listed[number] for number in step.feature(candidate(text))]


def test_concepts_match_as_whole_words(listed: str) -> None:
    step = ConceptBalance(concepts=listed)
    assert matches(step, "Catalogue of a CAT, a hot\n dog; bobcat") == ["cat", "dog", "hot dog"]
    assert matches(step, "黑猫坐在窗边。C++, café") == ["c++", "猫", "窗边", "café"]
    assert matches(ConceptBalance(concepts=listed, whole_words=False), "Catalogue") == ["cat"]
    assert matches(ConceptBalance(concepts=listed, ignore_case=False), "Cat Café cat") == ["cat", "Café"]
    words = [word for word in CONCEPTS if word.isascii() and word.isalpha()]
    for text in ("cat-dog", "the ibis's cat", "dogcat", "cat1", "a_cat", "dog.", "(ibis)"):
        expected = [word for word in words if re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", text)]
        assert matches(step, text) == expected


def test_a_sample_is_kept_if_one_of_its_concepts_keeps_it(listed: str) -> None:
    texts = ["a cat", "a cat and a dog", "an ibis with a cat", "nothing here", "a dog"] * 60
    samples = [candidate(text, name=f"shard.tar/{number}") for number, text in enumerate(texts)]
    for cap in (1, 50, 10_000):
        step = ConceptBalance(concepts=listed, cap=cap, seed=3)
        counts = Counter(concept for sample in samples for concept in matches(step, sample.text))
        assert counts == {"cat": 180, "dog": 120, "ibis": 60}
        expected = {}
        for row, sample in enumerate(samples):
            found = matches(step, sample.text)
            shares = [min(1.0, cap / counts[concept]) for concept in found]
            if not found:
                expected[row] = "no_concept"
            elif not any(uniform(3, sample.name, c) < share for c, share in zip(found, shares, strict=True)):
                expected[row] = "common_concept"
        assert {row: found.reason for row, found in filtered(step, samples).items()} == expected
        kept = Counter(text for row, text in enumerate(texts) if row not in expected)
        if cap == 50:  # shares are 50/180, 50/120 and 50/60 of 60 samples, alone or together
            assert 8 < kept["a cat"] < 26
            assert 24 < kept["a cat and a dog"] < 46
            assert kept["an ibis with a cat"] > 45
    assert filtered(ConceptBalance(concepts=listed, keep_unmatched=True), samples) == {}


def test_the_choice_does_not_depend_on_order_or_on_other_samples(listed: str) -> None:
    samples = [candidate("a cat", name=f"shard.tar/{number}") for number in range(200)]
    step = ConceptBalance(concepts=listed, cap=100)
    removed = {samples[row].name for row in filtered(step, samples)}
    backwards = samples[::-1]
    assert {backwards[row].name for row in filtered(step, backwards)} == removed
    more = [*samples, *(candidate("a dog", name=f"other.tar/{number}") for number in range(50))]
    assert {more[row].name for row in filtered(step, more)} == removed
    assert {samples[row].name for row in filtered(ConceptBalance(concepts=listed, cap=100, seed=1), samples)} != removed


def test_a_missing_or_empty_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for concepts, message in (("", "is not a file"), (str(tmp_path / "empty.txt"), "contains no concepts")):
        with pytest.raises(DataError, match=message):
            ConceptBalance(concepts=concepts).check()
