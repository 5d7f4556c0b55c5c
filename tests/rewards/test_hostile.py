"""Answers that are long, deep, malformed or meant to be run: no verifier raises or hangs, and no score leaves 0..1."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rewards.table import VERIFIERS
from rewards.verdict import Ask, Item, Outcome, Verdict
from rewards.verifiers.text import Text

REFERENCES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ocr": [("Invoice 2041 " * 40, {}), ("发票号码", {"ignore_case": True})],
    "grounding": [("[[100,100,300,300],[500,500,600,600]]", {}), ("[]", {"iou": 0.0})],
    "video": [("[10, 20]", {}), ("0:15", {}), ("a red car", {})],
    "geoguess": [('{"place_name": "Eiffel Tower", "address": "Paris, France"}', {})],
    "gui_mobile": [
        ('{"action_type": "input_text", "text": "weather", "override": true, "box_2d": [[100, 100, 200, 200]]}', {}),
        ('{"action_type": "answer", "text": "yes"}', {}),
    ],
    "gui_desktop": [
        ("left_drag(start_box='[100,100]', end_box='[300,300]')", {}),
        ("scroll(start_box='[500,500]', direction='down', step=5)", {}),
        ("type(content='hello world')", {}),
    ],
    "gui_web": [
        ("Click [5]", {}),
        ("Type [3]; [weather]", {}),
        ("ANSWER; <content>Paris</content>", {}),
        ("Key; [Return]", {}),
    ],
    "code": [
        ("def f(a):\n    return [a, 1]", {}),
        ('{"a": [1, {"b": null}]}', {"language": "json"}),
        ('<svg><rect x="1" y="2"/>a</svg>', {"language": "svg"}),
        ("<p>a<ul><li>b</ul>", {"language": "html"}),
        ("int main() { return 0; }", {"language": "text"}),
    ],
    "instruction": [
        (
            json.dumps(
                [{"rule": rule, "at_least": 3} for rule in ("words", "sentences", "paragraphs", "lines", "bullets")]
            ),
            {},
        ),
        ('[{"rule": "json"}, {"rule": "case", "is": "upper"}, {"rule": "script", "is": "latin"}]', {"partial": True}),
        ('[{"rule": "contains", "text": "aa"}, {"rule": "ends_with", "text": "b"}]', {"partial": True}),
    ],
}
OF_WORDS = [("2", {}), ("left", {}), ("B", {}), ("the Eiffel Tower", {}), ("1.98 m", {"tolerance": 0.1}), ("yes", {})]
# test_hostile_mathematics.py has the others
NAMES = [name for name, verifier in VERIFIERS.items() if name in REFERENCES or isinstance(verifier, Text)]
QUESTION = "Which? (A) a cat (B) a dog"

SIGNS = "[({<]})>'\"`*_$\\/,;:.-+=#&%~^|!?019aA \n\t\0é中９𝟜🙂\u0301\u0323\u200b\u202e\ufeff\ud800\x85\u2028"
WORDS = (
    "<a> </a> <!-- &amp; [[ ]] {{ [1, 1e9 -1 NaN null 10: 1:2: to and or yes, A. (A) image 第 \\' \\n 9^9 def( if ```"
)
PIECES = [*SIGNS, *WORDS.split()]
WHOLE = [
    "",
    " ",
    "\0",
    "\ud800",
    "None",
    "nan",
    "inf",
    "-0",
    "1e999",
    "9" * 5000,
    "0x10",
    "1_000",
    "{" * 5000,
    "[" * 100_000,
    "(" * 100_000,
    "[[" * 20_000 + "]]" * 20_000,
    '{"a":' * 30_000,
    "-" * 50_000 + "1",
    "1+" * 40_000 + "1",
    "9^{9^{9^{9}}}",
    "a." * 30_000 + "a",
    "__import__('os').system('touch RAN')",
    "eval('1')",
    "{'action_type': __import__('os').system('touch RAN')}",
    "left_click(start_box=open('RAN','w'))",
    "<!DOCTYPE a [<!ENTITY b 'c'><!ENTITY d '&b;&b;&b;'>]><a>&d;</a>",
    '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
    "<a>" * 30_000,
    "<a " + "b='c' " * 15_000 + "/>",
    "&#9;" * 20_000,
    "<" * 100_000,
    "```\n" * 20_000,
    "`" * 90_000,
    "if 1:\n" + " " * 90_000,
    "a" + "\u0301\u0323" * 40_000,
    "\u0345" * 90_000,
    "\uffff",
    "\u202eabc",
    "ﷺ" * 30_000,
    "İ" * 90_000,
    "ß" * 90_000,
    "á" * 90_000,
    "[100,100,300,300]," * 40_000,
    "[1,1,2,2]" * 999,
    "100," * 200_000,
    "(1 1 2 2)" * 50_000,
    "10-20," * 100,
    "10:10:10" * 300,
    "1 h " * 400,
    "yes, " * 300,
    "left " * 15,
    "image 2 and " * 30,
    "(A) " * 40,
    "A. " * 60,
    '"' * 499,
    "**" * 200,
    "the " * 100,
    "left_click(" + "a='b'," * 3000 + ")",
    "type(content='" + "\\" * 19_000,
    "type(content='" + "ab" * 9000 + "')",
    "scroll(start_box='[5,5]', step=" + "9" * 9000 + ")",
    "Type [3]; [" + "weather" * 2500 + "]",
    "Type 3" + " " * 19_000,
    "Key;" + " " * 19_000,
    "Key; " + "a" * 19_000 + "]",
    "Click " + "[" * 10_000,
    "ANSWER; <content>" + "x" * 900 + "</content>",
    '{"action_type": "input_text", "text": "'
    + "weather" * 2000
    + '", "override": true, "box_2d": [[100, 100, 200, 200]]}',
    '{"action_type": "answer", "text": ["yes"]}',
    '{"action_type": "answer", "text": null}',
    '{"action_type": {"a": []}, "text": "yes"}',
    '{"' + "k" * 50_000 + '": [' + "1," * 20_000 + "1]}",
    "[" + "[1]," * 10_000 + "1]",
    "x=[" + "1," * 40_000 + "]",
    "f'{" * 9000,
    "\\N{" * 9000,
    "ab " * 300_000,
    "a\n" * 400_000,
    "1 " * 400_000,
    "\n" * 900_000,
    " " * 900_000,
    "." * 900_000,
    "!?" * 400_000,
    "!?" * 400_000 + "a",
    "A  B  " * 80 + "!",
    "- a\n" * 200_000,
    "".join(map(chr, range(1, 0x3000))),
    "👩‍👩‍👧" * 20_000,
    "中" * 900_000,
    "a" * 1_000_000,
    "9" * 1_000_000,
    "[" * 1_000_000,
    "'" * 1_000_000,
]


def hostile(name: str, count: int) -> Iterator[str]:
    """Yield answers: whole ones, mixtures of pieces, and references with pieces exchanged, as many as asked for."""
    rng = random.Random(name)
    yield from WHOLE
    wanted = [reference for reference, _ in REFERENCES.get(name, OF_WORDS)]
    for i in range(count - len(WHOLE)):
        if i % 2:
            yield "".join(rng.choices(PIECES, k=rng.randrange(1, 60)))
        else:
            text = rng.choice(wanted)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(3) :]
            yield text


def scored(name: str, answer: str, reference: str, settings: dict[str, Any]) -> tuple[Outcome, float]:
    start = time.process_time()
    outcome = VERIFIERS[name].score(answer, Item(QUESTION, reference, settings))
    return outcome, time.process_time() - start


@pytest.mark.parametrize("name", NAMES)
def test_hostile_answers_get_an_outcome_within_seconds(name: str, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    answers = list(hostile(name, 400))
    assert len(answers) == 400
    for reference, settings in REFERENCES.get(name, OF_WORDS):
        VERIFIERS[name].check(Item(QUESTION, reference, settings))
        for answer in answers:
            outcome, seconds = scored(name, answer, reference, settings)
            assert isinstance(outcome, Ask) or (isinstance(outcome, Verdict) and 0 <= outcome.score <= 1)
            assert seconds < 5, (answer[:50], len(answer), seconds)
    assert not list(tmp_path.iterdir())  # nothing was run


@pytest.mark.fast
@pytest.mark.parametrize("name", NAMES)
def test_reference_itself_is_right_and_outcomes_are_the_same_again(name: str) -> None:
    for reference, settings in REFERENCES.get(name, OF_WORDS):
        item = Item(QUESTION, reference, settings)
        if name not in ("geoguess", "instruction"):
            outcome, _ = scored(name, reference, reference, settings)
            assert isinstance(outcome, Verdict)
            assert outcome.score == 1
        for answer in list(hostile(name, 150))[len(WHOLE) :]:
            assert VERIFIERS[name].score(answer, item) == VERIFIERS[name].score(answer, item)
