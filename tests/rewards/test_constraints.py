"""Constraints of instructions: each met and not met, both forms of the score, and what a record may not say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rewards.constraints import RULES
from rewards.scoring import Task, score_response
from rewards.table import VERIFIERS
from rewards.verdict import Item, RewardError, Verdict

pytestmark = pytest.mark.fast
INSTRUCTION = VERIFIERS["instruction"]


def score(answer: str, *constraints: dict[str, Any], **settings: Any) -> float:
    item = Item("", json.dumps(constraints), settings)
    INSTRUCTION.check(item)
    outcome = INSTRUCTION.score(answer, item)
    assert isinstance(outcome, Verdict)
    return outcome.score


COUNTED = {
    "words": [
        ("One two, three.", 3),
        ("It's a well-known fact", 4),
        ("你好 world", 3),
        ("3.5 m", 3),
        ("...", 0),
        ("naïve café", 2),
    ],
    "sentences": [
        ("One. Two! Three?", 3),
        ("One. Two", 2),
        ("What?! No...", 2),
        ("3.5 m is it.", 1),
        ("你好。再见！", 2),
        ('He said "yes." Then he left.', 2),
    ],
    "paragraphs": [("a\n\nb", 2), ("a\nb", 1), ("a\n \n\n\nb\n\n", 2)],
    "lines": [("a\nb\n\nc", 3), ("a\r\nb", 2)],
    "bullets": [("- a\n* b\n• c\n+ d", 4), ("1. a\n2) b\n 10. c", 3), ("-a\n1.a\na - b", 0), ("List:\n- a\n\n- b", 2)],
    "characters": [("abc", 3), ("  a c \n", 3), ("é", 1), ("e\u0301", 1)],
}


@pytest.mark.parametrize(
    ("rule", "text", "count"), [(rule, *case) for rule, cases in COUNTED.items() for case in cases]
)
def test_counts(rule: str, text: str, count: int) -> None:
    assert score(text, {"rule": rule, "exactly": count}) == 1
    assert score(text, {"rule": rule, "exactly": count + 1}) == 0
    assert score(text, {"rule": rule, "at_least": count}) == 1
    assert score(text, {"rule": rule, "at_least": count + 1}) == 0
    assert score(text, {"rule": rule, "at_most": count}) == 1
    assert score(text, {"rule": rule, "at_least": 0, "at_most": count}) == 1
    if count:
        assert score(text, {"rule": rule, "at_most": count - 1}) == 0


@pytest.mark.parametrize(
    ("text", "constraint", "met"),
    [
        ("The Tower.", {"rule": "contains", "text": "tower"}, True),
        ("The Tower.", {"rule": "contains", "text": "tower", "ignore_case": False}, False),
        ("The Tower.", {"rule": "contains", "text": "church"}, False),
        ("tower, tower", {"rule": "contains", "text": "tower", "at_least": 2}, True),
        ("tower, tower", {"rule": "contains", "text": "tower", "exactly": 1}, False),
        ("tower, tower", {"rule": "contains", "text": "tower", "at_most": 1}, False),
        ("Cafe\u0301", {"rule": "contains", "text": "caf\u00e9"}, True),
        ("So sorry", {"rule": "excludes", "text": "SORRY"}, False),
        ("So sorry", {"rule": "excludes", "text": "SORRY", "ignore_case": False}, True),
        ("So glad", {"rule": "excludes", "text": "sorry"}, True),
        (" Dear Sir", {"rule": "starts_with", "text": "dear"}, True),
        ("My dear Sir", {"rule": "starts_with", "text": "dear"}, False),
        ("Yours, A.\n", {"rule": "ends_with", "text": "a."}, True),
        ("Yours, A. B", {"rule": "ends_with", "text": "a."}, False),
        ("ABC, 1!", {"rule": "case", "is": "upper"}, True),
        ("ABc", {"rule": "case", "is": "upper"}, False),
        ("abc, 1!", {"rule": "case", "is": "lower"}, True),
        ("aBc", {"rule": "case", "is": "lower"}, False),
        ("123", {"rule": "case", "is": "lower"}, False),
        ('{"a": [1]}', {"rule": "json"}, True),
        ('```json\n{"a": [1]}\n```', {"rule": "json"}, True),
        ("{'a': 1}", {"rule": "json"}, False),
        ('Here: {"a": 1}', {"rule": "json"}, False),
        ("Привет, мир", {"rule": "script", "is": "cyrillic"}, True),
        ("Hello, мир", {"rule": "script", "is": "cyrillic"}, False),
        ("Hello, мир", {"rule": "script", "is": "cyrillic", "share": 0.3}, True),
        ("这是一座塔。", {"rule": "script", "is": "han"}, True),
        ("This is a tower", {"rule": "script", "is": "han"}, False),
        ("Ceci est naïf", {"rule": "script", "is": "latin"}, True),
        ("123", {"rule": "script", "is": "latin"}, False),
    ],
)
def test_rules(text: str, constraint: dict[str, Any], met: bool) -> None:
    assert score(text, constraint) == float(met)


def test_every_rule_has_a_test() -> None:
    tested = {*COUNTED, "contains", "excludes", "starts_with", "ends_with", "case", "json", "script"}
    assert tested == set(RULES)


def test_all_or_a_share() -> None:
    constraints: list[dict[str, Any]] = [
        {"rule": "words", "exactly": 2},
        {"rule": "case", "is": "lower"},
        {"rule": "contains", "text": "b"},
        {"rule": "lines", "exactly": 1},
    ]
    assert score("a b", *constraints) == 1
    assert score("a B", *constraints) == 0
    assert score("a B", *constraints, partial=True) == 3 / 4
    assert score("A", *constraints, partial=True) == 1 / 4
    assert score(" ", *constraints, partial=True) == 0


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("fifty words", "not a JSON list"),
        ("[]", "not a JSON list"),
        ('{"rule": "json"}', "not a JSON list"),
        ("[1]", "with a rule"),
        ('[{"exactly": 1}]', "with a rule"),
        ('[{"rule": "word", "exactly": 1}]', "did you mean words"),
        ('[{"rule": "words"}]', "needs one of exactly, at_least, at_most"),
        ('[{"rule": "words", "most": 1}]', "has no key 'most'"),
        ('[{"rule": "words", "exactly": 1.5}]', "exactly of the rule words is 1.5"),
        ('[{"rule": "words", "exactly": true}]', "is True"),
        ('[{"rule": "words", "at_most": -1}]', "is -1"),
        ('[{"rule": "contains"}]', "needs text"),
        ('[{"rule": "contains", "text": " "}]', "text of the rule contains"),
        ('[{"rule": "case", "is": "title"}]', "is of the rule case"),
        ('[{"rule": "case", "is": ["upper"]}]', "is of the rule case"),
        ('[{"rule": "script", "is": "english"}]', "is of the rule script"),
        ('[{"rule": "script", "is": "latin", "share": 0}]', "share of the rule script"),
        ('[{"rule": "json", "is": "upper"}]', "it has none"),
        (json.dumps([{"rule": "json"}] * 101), "1 to 100"),
    ],
)
def test_wrong_reference_is_refused(reference: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        INSTRUCTION.check(Item("", reference))


@pytest.mark.parametrize(
    ("response", "score", "reason"),
    [
        ("<think>One word?</think>Paris is in France.", 1, "all_met"),
        ("<think>A long thought that does not count.</think>Paris.", 0, "not_met"),
        ("<think>..</think>Paris is in <|begin_of_box|>France<|end_of_box|>.", 0, "boxed"),
        ("Paris is in France.", 0, "bad_form"),
        ("<think>..</think>", 0, "empty"),
    ],
)
def test_text_after_the_thought_is_scored_as_a_whole(response: str, score: float, reason: str) -> None:
    task = Task(INSTRUCTION, Item("", '[{"rule": "words", "exactly": 4}]'), form="glm45v")
    task.check()
    assert score_response(response, task).outcome == Verdict(score, reason)
