"""Style of responses: mixed languages, repetition, a box where nothing can be verified; and what is no fault."""

from __future__ import annotations

import random
import time

import pytest

from rewards.style import mixes_languages, repeats, style_verdict

pytestmark = pytest.mark.fast

CHINESE = "图中有七个点，我再数一遍。" * 5
ENGLISH = " ".join(["The image shows seven dots in two rows and one more"] * 20)
SENTENCE = "I look at the image once more and count the dots. "


def words(count: int) -> str:
    """Return a text that does not repeat itself."""
    rng = random.Random(7)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(count))


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        (f"{CHINESE}\n\n{ENGLISH}", True),
        (f"{ENGLISH}\n\n{CHINESE}", True),
        (f"{CHINESE}\n{ENGLISH}", True),
        (CHINESE, False),
        (ENGLISH, False),
        (f"这是 short\n\n{ENGLISH}", False),
        (f"{CHINESE}\n\nseven dots", False),
        (f"{ENGLISH} The sign says {CHINESE} and no more.", False),
        ("字" * 50 + "\n\n" + "word " * 200, True),
        ("字" * 49 + "\n\n" + "word " * 200, False),
        ("字" * 50 + "\n\n" + "word " * 199, False),
    ],
)
def test_mixed_languages(text: str, mixed: bool) -> None:
    assert mixes_languages(text) == mixed


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        (SENTENCE * 12, True),
        (SENTENCE * 9, False),
        ((SENTENCE + words(30) + " ") * 10, True),
        (words(2000), False),
        ("我再看一遍这张图，数一数其中的点，一共有七个，没有别的了。" * 30, True),
        ("这" * 60, False),
        ("word " * 210, False),
        ("word " * 2000, True),
        ("哈哈" * 3000, True),
        ("| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | 12 | 13 |\n" * 40, False),
        ("|---|---|\n" * 40, False),
        ("<table>" + "<tr><td>0</td><td>0</td><td>0</td></tr>" * 40 + "</table>", False),
        ("=" * 5000, False),
        ("", False),
    ],
)
def test_repetition(text: str, repeated: bool) -> None:
    assert repeats(text) == repeated


def test_repetition_is_found_wherever_it_stands() -> None:
    for offset in range(0, 50, 7):
        assert repeats(words(200) + "x" * offset + SENTENCE * 11 + words(100))


def test_empty_lines_take_time_that_is_linear_in_their_number() -> None:
    start = time.process_time()
    assert not repeats("a" + "\n" * 390_000 + "b")
    assert repeats("a" + "\n " * 190_000 + "b")
    assert time.process_time() - start < 5  # from each empty line to the last: minutes


def test_box_is_refused_where_nothing_is_verifiable() -> None:
    box = "A poem about <|begin_of_box|>spring<|end_of_box|>."
    verdict = style_verdict("", box, verifiable=False)
    assert verdict is not None
    assert (verdict.score, verdict.reason) == (0, "boxed")
    assert style_verdict("", box) is None
    assert style_verdict(box, "A poem about spring.", verifiable=False) == verdict  # a box in the thought is one too
    assert style_verdict(box, "A poem about spring.") is None
