"""Edit distance and common subsequence against the textbook's table, and the transcription verifier."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from rewards.similarity import common_subsequence, edit_similarity, shared_bigrams
from rewards.table import VERIFIERS
from rewards.verdict import Item, RewardError, Verdict

pytestmark = pytest.mark.fast
OCR = VERIFIERS["ocr"]


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's distance by the table of all prefixes."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_similarities_of_random_texts_and_lists() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("ab c号é", k=rng.randrange(30))) for _ in range(2))
        for x, y in ((a, b), (list(a), list(b))):
            longer = max(len(x), len(y), 1)
            assert edit_similarity(x, y) == pytest.approx(1 - edits(x, y) / longer)
            assert common_subsequence(x, y) == pytest.approx(longest_common(x, y) / longer if a or b else 1)


def test_shared_bigrams() -> None:
    assert shared_bigrams("night", "nacht") == pytest.approx(1 / 7)  # ni ig gh ht, na ac ch ht
    assert shared_bigrams("aaaa", "aa") == 1  # sets: how often does not count
    assert shared_bigrams("a", "b") == 0
    assert shared_bigrams("a", "a") == 1
    assert shared_bigrams("", "ab") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "score"),
    [
        ("Invoice 2041", "Invoice 2041", {}, 1),
        ("Invoice\t2041\u3000\u00a0", "In voice\n2041", {}, 1),  # every white space of Unicode
        ("Invoice 204", "Invoice 2041", {}, 10 / 11),
        ("Invoice 20411", "Invoice 2041", {}, 11 / 12),
        ("", "Invoice", {}, 0),
        (" \n", "Invoice", {}, 0),
        ("", "", {}, 1),
        ("  ", "\n", {}, 1),
        ("abc", "", {}, 0),
        ("Cafe\u0301", "Caf\u00e9", {}, 1),  # decomposed and composed
        ("Cafe", "Caf\u00e9", {}, 3 / 4),
        ("ABC", "abc", {}, 0),
        ("ABC", "abc", {"ignore_case": True}, 1),
        ("ABC", "abc", {"ignore_case": False}, 0),
        ("ÉTÉ", "été", {"ignore_case": True}, 1),
        ("发票编号", "发票号码", {}, 0.5),
        ("xyz", "abc", {}, 0),
        ("2¹⁰", "2^10", {}, 1 / 4),  # not folded: what is written counts
    ],
)
def test_ocr(answer: str, reference: str, settings: dict[str, bool], score: float) -> None:
    item = Item("", reference, settings)
    OCR.check(item)
    outcome = OCR.score(answer, item)
    assert isinstance(outcome, Verdict)
    assert outcome.score == pytest.approx(score)


def test_ocr_settings_and_reference_are_checked() -> None:
    with pytest.raises(RewardError, match="did you mean ignore_case"):
        OCR.check(Item("", "a", {"ignorecase": True}))
    with pytest.raises(RewardError, match="not of type bool"):
        OCR.check(Item("", "a", {"ignore_case": "yes"}))
    with pytest.raises(RewardError, match="characters, at most"):
        OCR.check(Item("", "a" * 200_000))


def test_a_megabyte_against_a_page_takes_seconds() -> None:
    rng = random.Random(1)
    page, answer = ("".join(rng.choices("abcdefgh ", k=length)) for length in (8_000, 1_000_000))
    start = time.process_time()
    outcome = OCR.score(answer, Item("", page))
    assert time.process_time() - start < 5
    assert isinstance(outcome, Verdict)
    letters = len("".join(page.split()))
    assert 0 < outcome.score <= letters / len("".join(answer.split()))
