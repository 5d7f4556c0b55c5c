"""The final answer of a response, in both models' forms, and every reason for which there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.answer import FORMS, REASONS, Extracted, extract
from rewards.verdict import Verdict

pytestmark = pytest.mark.fast

CASES = json.loads((Path(__file__).parent / "cases.json").read_text(encoding="utf-8"))
FORMAT_CASES = [case for case in CASES if case["domain"] == "format" and case.get("verifiable", True)]

BOX = "<|begin_of_box|>7<|end_of_box|>"
GOOD = {
    "glm45v": [
        f"<think>Seven dots.</think>\n{BOX}",
        f"<think></think>\n{BOX}",
        f"<think>It is {BOX}.</think>There are {BOX} dots.",
        f"  <think>\n\\boxed{{7}}</think>{BOX}\n<|user|>",
        "<think>.</think><|begin_of_box|>\n7\n<|end_of_box|><|endoftext|>\n",
    ],
    "glm41v": [
        f"<think>Seven.</think><answer>{BOX}</answer>",
        f"<think>Seven.</think>\n\n<answer>There are {BOX} dots.</answer>\n<|endoftext|>",
    ],
}
WITHOUT_THOUGHT = {
    "glm45v": [BOX, f"There are {BOX} dots.", f"<think></think>\n{BOX}"],
    "glm41v": [f"<answer>{BOX}</answer>", f"<think> </think><answer>{BOX}</answer>"],
}
BAD = [
    ("glm45v", BOX, "bad_form"),
    ("glm45v", f"Well. <think>Seven.</think>{BOX}", "bad_form"),
    ("glm45v", f"Seven.</think>{BOX}", "bad_form"),
    ("glm45v", f"<think>a<think>b</think>{BOX}", "bad_form"),
    ("glm45v", f"<think>a</think>b</think>{BOX}", "bad_form"),
    ("glm45v", f"<think>a</think><think>b</think>{BOX}", "bad_form"),
    ("glm45v", f"<think>a</think><answer>{BOX}</answer>", "bad_form"),
    ("glm45v", f"<think>a</think>{BOX}</answer>", "bad_form"),
    ("glm45v", "<think>a</think><|end_of_box|>7<|begin_of_box|>", "bad_form"),
    ("glm45v", f"<think>a</think>{BOX}<|end_of_box|>", "bad_form"),
    ("glm41v", f"<think>a</think>{BOX}", "bad_form"),
    ("glm41v", f"<answer>{BOX}</answer>", "bad_form"),
    ("glm41v", f"<think>a</think>So: <answer>{BOX}</answer>", "bad_form"),
    ("glm41v", f"<think>a</think><answer>{BOX}</answer> Right?", "bad_form"),
    ("glm41v", f"<think>a</think><answer>{BOX}</answer><answer>{BOX}</answer>", "bad_form"),
    ("glm41v", f"<think>a</think><answer><answer>{BOX}</answer></answer>", "bad_form"),
    ("glm41v", f"<think>a <answer>{BOX}</answer>", "bad_form"),
    ("glm45v", f"<think>I count {BOX}", "cut_off"),
    ("glm45v", "<think>a</think>There are <|begin_of_box|>7", "cut_off"),
    ("glm41v", f"<think>a</think><answer>{BOX}", "cut_off"),
    ("glm45v", "", "bad_form"),
    ("glm45v", "<think>a</think>", "no_box"),
    ("glm45v", "<think>a</think>7", "no_box"),
    ("glm45v", f"<think>{BOX}</think>7", "no_box"),
    ("glm41v", "<think>a</think><answer></answer>", "no_box"),
    ("glm45v", f"<think>a</think>{BOX} or {BOX}", "two_boxes"),
    ("glm41v", f"<think>a</think><answer>{BOX}{BOX}</answer>", "two_boxes"),
    ("glm45v", f"<think>a</think><|begin_of_box|>{BOX}<|end_of_box|>", "nested"),
    ("glm45v", "<think>a</think><|begin_of_box|><|end_of_box|>", "empty"),
    ("glm45v", "<think>a</think><|begin_of_box|> \n<|end_of_box|>", "empty"),
    ("glm45v", "<think>a</think>\\boxed{7}", "latex_box"),
    ("glm45v", f"<think>a</think>\\boxed{{7}} {BOX}", "latex_box"),
    ("glm45v", "<think>a</think><|begin_of_box|>\\boxed{7}<|end_of_box|>", "latex_box"),
]


@pytest.mark.parametrize("case", FORMAT_CASES, ids=lambda case: case["id"])
def test_open_cases_of_the_form(case: dict[str, Any]) -> None:
    found = extract(case["response"], case["form"], case.get("thinking", True))
    assert isinstance(found, Extracted) == bool(case["expected"])
    assert isinstance(found, Verdict) or found.answer == case["reference"]


@pytest.mark.parametrize(("form", "response"), [(form, text) for form, texts in GOOD.items() for text in texts])
def test_answer_is_found_in_its_own_form_only(form: str, response: str) -> None:
    found = {name: extract(response, name) for name in FORMS}  # type: ignore[arg-type]
    assert {name for name, answer in found.items() if isinstance(answer, Extracted)} == {form, "either"}
    answer = found[form]
    assert answer == found["either"]
    assert isinstance(answer, Extracted)
    assert answer.answer == "7"


@pytest.mark.parametrize(
    ("form", "response"), [(form, text) for form, texts in WITHOUT_THOUGHT.items() for text in texts]
)
def test_thought_may_be_absent_where_thinking_is_off(form: Any, response: str) -> None:
    found = extract(response, form, thinking=False)
    assert isinstance(found, Extracted)
    assert (found.answer, found.parts.thought) == ("7", "")


def test_thought_where_thinking_is_off_is_bad_form() -> None:
    assert extract(GOOD["glm45v"][0], "glm45v", thinking=False) == Verdict(0.0, "bad_form")


@pytest.mark.parametrize(("form", "response", "reason"), BAD)
def test_answer_is_refused_with_a_reason(form: Any, response: str, reason: str) -> None:
    assert extract(response, form) == Verdict(0.0, reason)


def test_every_reason_has_an_example() -> None:
    assert {reason for _, _, reason in BAD} == set(REASONS)
