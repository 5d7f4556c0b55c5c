"""From held-out samples to questions: what the model is given, and what it is expected to write.

    ocr          the image                                           the text
    grounding    the text before each list of boxes, with its image  the boxes
    chat         all before the last answer, as in training          the answer: a boxed result, boxes or text

The prompt is the beginning of the sample as training renders it, up to the first token that the answer is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.sample import Element, Sample, Text, Token
from tools.scoring import (
    boxed_span,
    boxes_in,
    final_answer,
    first_list_of_boxes,
    score_boxed,
    score_boxes,
    score_ocr,
    score_text,
)

SCORED_DOMAINS = ("ocr", "grounding", "chat")
TOKENS_PER_BOX = 32
_LIST_OF_BOXES = re.compile(r"\[\s*\[[\d\s.,]+\](?:\s*,\s*\[[\d\s.,]+\])*\s*\]")


@dataclass(frozen=True)
class Question:
    """One prompt and how its answer is scored."""

    kind: str  # ocr, boxes, boxed or text
    prompt: tuple[Element, ...]
    expected: str
    score: Callable[[str], dict[str, float]]
    max_tokens: int | None = None  # longest answer that makes sense; None: as the call says


def questions_of(sample: Sample) -> list[Question]:
    """Return the questions of a sample; none if nothing in it can be compared."""
    return list(_MAKERS[sample.domain](sample.elements))


def _ocr(elements: Sequence[Element]) -> Iterator[Question]:
    first = next(n for n, element in enumerate(elements) if isinstance(element, Text))
    expected = _text(elements[first:])
    if expected.strip():
        yield Question("ocr", tuple(elements[:first]), expected, lambda given: score_ocr(given, expected))


def _grounding(elements: Sequence[Element]) -> Iterator[Question]:
    for number, element in enumerate(elements):
        if not isinstance(element, Text):
            continue
        for found in _LIST_OF_BOXES.finditer(element.text):
            boxes = boxes_in(found[0])
            before = element.text[: found.start()].rstrip()  # a space belongs to the token after it
            prompt = (*elements[:number], *([Text(before)] if before else []))
            if boxes:
                yield Question("boxes", prompt, found[0], _box_score(found[0]), TOKENS_PER_BOX * (len(boxes) + 1))


def _box_score(expected: str) -> Callable[[str], dict[str, float]]:
    return lambda given: score_boxes(first_list_of_boxes(given), boxes_in(expected))


def _chat(elements: Sequence[Element]) -> Iterator[Question]:
    begin = max(n for n, element in enumerate(elements) if element == Token("<|assistant|>")) + 1
    learned = [n for n in range(begin, len(elements)) if _has_loss(elements[n])]
    if not learned:
        return
    prompt = tuple(elements[: learned[0]])
    expected = final_answer(_text(elements[learned[0] : -1]))  # the last token begins the next turn
    boxed = boxed_span(expected)
    if boxed is not None and not boxes_in(boxed):
        yield Question("boxed", prompt, boxed, lambda given: score_boxed(final_answer(given), boxed))
    elif boxes := boxes_in(expected):
        yield Question("boxes", prompt, expected, lambda given: score_boxes(boxes_in(final_answer(given)), boxes))
    elif expected:
        yield Question("text", prompt, expected, lambda given: score_text(final_answer(given), expected))


def _has_loss(element: Any) -> bool:
    return bool(getattr(element, "loss", False))


def _text(elements: Sequence[Element]) -> str:
    """Return text and the names of special tokens."""
    parts = []
    for element in elements:
        if isinstance(element, Text):
            parts.append(element.text)
        elif isinstance(element, Token) and element.name != "<|endoftext|>":
            parts.append(element.name)
    return "".join(parts)


_MAKERS: dict[str, Callable[[Sequence[Element]], Iterator[Question]]] = {
    "ocr": _ocr,
    "grounding": _grounding,
    "chat": _chat,
}
