r"""Scores of an answer against the expected one: text, boxes, and results in a box of their own.

ocr       1 - edit distance / length of the longer text
boxes     intersection over union of [[x1,y1,x2,y2],...], in thousandths of the image
boxed     the one span between <|begin_of_box|> and <|end_of_box|>, equal as text or as a number
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from rapidfuzz.distance import Levenshtein

from data_pipeline.media.boxes import Box, written_boxes

BOX_BEGIN, BOX_END = "<|begin_of_box|>", "<|end_of_box|>"
IOU_THRESHOLD = 0.5
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_BOXED = re.compile(re.escape(BOX_BEGIN) + "(.*?)" + re.escape(BOX_END), re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
LONGEST_NUMBER = 1000  # characters: a model may repeat a digit without end, and Python reads no more than 4300


def final_answer(text: str) -> str:
    """Return what follows the thought, without <answer> and </answer>: both published forms.

    >>> final_answer("<think>2 + 2</think><answer>It is 4.</answer>"), final_answer("<think>cut of")
    ('It is 4.', '')
    """
    if "<think>" in text and "</think>" not in text:
        return ""
    text = text.rpartition("</think>")[2]
    found = _ANSWER.search(text)
    return (found[1] if found else text).strip()


def boxed_span(answer: str) -> str | None:
    """Return the boxed result of an answer; None unless there is exactly one, which is closed."""
    found = _BOXED.findall(answer)
    if len(found) != 1 or answer.count(BOX_BEGIN) != 1 or answer.count(BOX_END) != 1:
        return None
    return str(found[0]).strip()


def same_result(given: str, expected: str) -> bool:
    """Return whether two results are equal as numbers, or as text regardless of case and of the amount of space.

    >>> same_result("1,000.0", "1000"), same_result("1/2", "0.5"), same_result("Red  car", "red car")
    (True, True, True)
    """
    numbers = number_of(given), number_of(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return normalised(given) == normalised(expected)


def normalised(text: str) -> str:
    """Return a text in lower case, with single spaces."""
    return " ".join(text.casefold().split())


def number_of(text: str) -> Fraction | None:
    """Return the number that a text is; None if it is no number. A sign of percent or dollars is ignored."""
    bare = text.strip().removeprefix("$").removesuffix("%").strip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", bare):
        bare = bare.replace(",", "")
    if len(bare) > LONGEST_NUMBER or not _NUMBER.fullmatch(bare):
        return None
    above, _, below = bare.partition("/")
    divisor = Fraction(below or 1)
    return Fraction(above) / divisor if divisor else None


def edit_similarity(given: str, expected: str) -> float:
    """Return 1 - edit distance / length of the longer text; 1 for two empty texts."""
    return Levenshtein.normalized_similarity(given, expected)


def boxes_in(text: str) -> list[Box]:
    """Return the boxes of a text, in order."""
    return [box for _, box in written_boxes(text)]


def first_list_of_boxes(text: str) -> list[Box]:
    """Return the boxes of a text up to the end of its first list."""
    end = text.find("]]")
    return boxes_in(text if end < 0 else text[: end + 2])


def iou(a: Box, b: Box) -> float:
    """Return the area that two boxes share per area that either covers; 0 if one has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def match_boxes(given: Sequence[Box], expected: Sequence[Box]) -> list[float]:
    """Match boxes one to one, the best pairs first, and return an IoU per box of the longer list; 0 without a partner.

    So boxes that are missing and boxes that are too many count alike.
    """
    pairs = sorted(
        ((iou(a, b), i, j) for i, a in enumerate(given) for j, b in enumerate(expected)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    matched: list[float] = []
    used_given: set[int] = set()
    used_expected: set[int] = set()
    for value, i, j in pairs:
        if i not in used_given and j not in used_expected:
            used_given.add(i)
            used_expected.add(j)
            matched.append(value)
    return matched + [0.0] * (max(len(given), len(expected)) - len(matched))


# --- scores of one answer ---------------------------------------------------------------------------------------------


def score_ocr(given: str, expected: str) -> dict[str, float]:
    """Score a transcription."""
    return {"similarity": edit_similarity(given.strip(), expected.strip())}


def score_boxes(given: Sequence[Box], expected: Sequence[Box]) -> dict[str, float]:
    """Score boxes: mean IoU, and the share above IOU_THRESHOLD."""
    values = match_boxes(given, expected)
    return {"iou": sum(values) / len(values), "found": sum(value > IOU_THRESHOLD for value in values) / len(values)}


def score_boxed(given: str, expected: str) -> dict[str, float]:
    """Score a boxed result.

    Args:
        given: The model's final answer.
        expected: The expected result, without its box.
    """
    span = boxed_span(given)
    return {
        "well_formed": float(span is not None),
        "correct": float(span is not None and same_result(span, expected)),
    }


def score_text(given: str, expected: str) -> dict[str, float]:
    """Score a free answer."""
    return {
        "correct": float(same_result(given, expected)),
        "similarity": edit_similarity(normalised(given), normalised(expected)),
    }
