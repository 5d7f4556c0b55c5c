"""Actions on telephones, desktops and web pages: reading them, and the scores by hand."""

from __future__ import annotations

import ast
import json
import math
import random
from typing import Any

import pytest

from rewards.calls import Call, read_call
from rewards.table import VERIFIERS
from rewards.verdict import Ask, Item, RewardError, Verdict

pytestmark = pytest.mark.fast

CLICK = {"action_type": "click", "box_2d": [[100, 100, 200, 200]]}
TYPE = {"action_type": "input_text", "text": "weather", "override": True, "box_2d": [[100, 100, 200, 200]]}
L, S = "left_click(start_box='[500,500]', element_info='OK')", "scroll(start_box='[500,500]', direction='down', step=5)"


def outcome(name: str, answer: str, reference: str) -> float | None:
    """Return a score, or None where a judge is asked."""
    item = Item("", reference)
    VERIFIERS[name].check(item)
    found = VERIFIERS[name].score(answer, item)
    assert found == Ask("text") or isinstance(found, Verdict)
    return found.score if isinstance(found, Verdict) else None


# --- telephones -------------------------------------------------------------------------------------------------------


def box(*numbers: Any) -> dict[str, Any]:
    return {**CLICK, "box_2d": [list(numbers)]}


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (CLICK, CLICK, 1),
        (box(150, 100, 250, 200), CLICK, 1 / 3),
        (box(100, 100, 200, 150), CLICK, 1 / 2),
        (box(120, 120, 180, 180), CLICK, 0.36),
        (box(200, 100, 300, 200), CLICK, 0),
        (box(200, 100, 100, 200), CLICK, 0),
        (box(150, 100, 150, 200), CLICK, 0),
        (box(100, 100, 200), CLICK, 0),
        (box(100, 100, 200, 200.0), CLICK, 0),
        (box(100, 100, 200, "200"), CLICK, 0),
        (box(100, 100, 200, True), CLICK, 0),
        (box(-1, 100, 200, 200), CLICK, 0),
        (box(100, 100, 1000, 200), CLICK, 0),
        (box(0, 0, 999, 999), box(0, 0, 999, 999), 1),
        ({**CLICK, "box_2d": [100, 100, 200, 200]}, CLICK, 0),
        ({**CLICK, "box_2d": [[100, 100, 200, 200], [100, 100, 200, 200]]}, CLICK, 0),
        ({**CLICK, "box_2d": None}, CLICK, 0),
        ({"action_type": "click"}, CLICK, 0),
        ({**CLICK, "element": "OK"}, CLICK, 0),
        ({"box_2d": [[100, 100, 200, 200]]}, CLICK, 0),
        ({**CLICK, "action_type": "Click"}, CLICK, 0),
        ({**CLICK, "action_type": ["click"]}, CLICK, 0),
        (TYPE, TYPE, 1),
        ({**TYPE, "text": "wether"}, TYPE, 6 / 7),
        ({**TYPE, "text": "wether", "box_2d": [[150, 100, 250, 200]]}, TYPE, 6 / 7 / 3),
        ({**TYPE, "text": ""}, TYPE, 0),
        ({**TYPE, "text": 7}, TYPE, 0),
        ({**TYPE, "text": ""}, {**TYPE, "text": ""}, 1),
        ({**TYPE, "text": "Cafe\u0301"}, {**TYPE, "text": "Caf\u00e9"}, 1),
        ({**TYPE, "override": False}, TYPE, 0),
        ({**TYPE, "override": 1}, TYPE, 0),
        ({**TYPE, "override": "true"}, TYPE, 0),
        ({key: value for key, value in TYPE.items() if key != "override"}, TYPE, 0),
        ({"action_type": "swipe", "direction": "up"}, {"action_type": "swipe", "direction": "up"}, 1),
        ({"action_type": "swipe", "direction": "down"}, {"action_type": "swipe", "direction": "up"}, 0),
        ({**CLICK, "action_type": "swipe", "direction": "up"}, {"action_type": "swipe", "direction": "up"}, 0),
        ({"action_type": "open_app", "app_name": "VLC"}, {"action_type": "open_app", "app_name": "VLC"}, 1),
        ({"action_type": "open_app", "app_name": "vlc"}, {"action_type": "open_app", "app_name": "VLC"}, 0),
        (
            {"action_type": "status", "goal_status": "infeasible"},
            {"action_type": "status", "goal_status": "complete"},
            0,
        ),
        ({"action_type": "wait"}, {"action_type": "wait"}, 1),
        ({"action_type": "wait"}, {"action_type": "navigate_back"}, 0),
        ({"action_type": "answer", "text": "7 pm"}, {"action_type": "answer", "text": "7 pm"}, 1),
        ({"action_type": "answer", "text": "Yes."}, {"action_type": "answer", "text": "yes"}, 1),
        ({"action_type": "answer", "text": "no"}, {"action_type": "answer", "text": "yes"}, 0),
        ({"action_type": "answer", "text": "at seven"}, {"action_type": "answer", "text": "7 pm"}, None),
    ],
)
def test_mobile(answer: dict[str, Any], reference: dict[str, Any], score: float | None) -> None:
    shuffled = list(answer.items())
    random.Random(0).shuffle(shuffled)
    found = outcome("gui_mobile", json.dumps(dict(shuffled), indent=1), json.dumps(reference))
    assert found == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize(
    "answer",
    [
        "click",
        "[]",
        "null",
        "7",
        '"click"',
        "[{}]",
        "{}",
        "{{}}",
        f"Action: {json.dumps(CLICK)}",
        f"{json.dumps(CLICK)} {json.dumps(CLICK)}",
        json.dumps(CLICK)[:-1],
        json.dumps([CLICK]),
        '{"action_type": "click", "action_type": "click", "box_2d": [[100, 100, 200, 200]]}',
        '{"action_type": "click", "box_2d": [[NaN, 100, 200, 200]]}',
        '{"action_type": "click", "box_2d": [[1e999, 100, 200, 200]]}',
        '{"action_type": "click", "box_2d": [[100, 100, 200, 200]],}',
    ],
)
def test_what_is_no_action_scores_nothing(answer: str) -> None:
    assert outcome("gui_mobile", answer, json.dumps(CLICK)) == 0


@pytest.mark.parametrize(
    "content",
    [
        CLICK,
        {**CLICK, "override": True, "other": None, "flag": False},
        {**CLICK, "text": 'it\'s "fine"\n\\ True, 007 and None'},
        {**CLICK, "text": "日本 '"},
    ],
)
def test_pythons_spelling_is_read(content: dict[str, object]) -> None:
    """GLM-V's own code reads it by `eval`, and its references are written so."""
    assert outcome("gui_mobile", repr(content), json.dumps(content)) == 1
    assert outcome("gui_mobile", json.dumps(content), repr(content)) == 1
    other = {**content, "action_type": "long_press"}
    assert outcome("gui_mobile", repr(other), json.dumps(content)) == 0


def test_leading_zeros_are_read() -> None:
    assert outcome("gui_mobile", '{"action_type": "click", "box_2d": [[0100, 100, 200, 0200]]}', json.dumps(CLICK)) == 1


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("click", "is no JSON object"),
        ("[]", "is no JSON object"),
        ("{}", "is no JSON object"),
        ('{"action_type": 1}', "is no JSON object"),
        (json.dumps(box(200, 100, 100, 200)), "box_2d of the reference"),
        (json.dumps(box(0, 0, 1000, 9)), "box_2d of the reference"),
        (json.dumps({**CLICK, "box_2d": []}), "box_2d of the reference"),
        ('{"action_type": "answer", "text": 7}', "not a text"),
    ],
)
def test_wrong_reference_of_a_telephone_is_refused(reference: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        outcome("gui_mobile", "{}", reference)


# --- desktops ---------------------------------------------------------------------------------------------------------


def python_call(text: str) -> Call | None:
    """What Python's parser makes of a call; None for what our grammar has not."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return Call(node.id, {})
        if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
            return None
        values = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        return Call(node.func.id, values) if all(type(value) in (str, int) for value in values.values()) else None
    except (SyntaxError, ValueError):
        return None


def test_calls_are_read_as_python_reads_them() -> None:
    rng = random.Random(0)
    quotes = ["'{}'", '"{}"']
    contents = ["", "[500,500]", "OK", "it\\'s", 'say \\"x\\"', "a\\nb", "a\\\\b", "(a, b)", "x=1", "名", "a, b='c'"]
    read = 0
    for _ in range(2000):
        names = rng.sample(["start_box", "step", "content", "keys"], rng.randrange(4))
        values = [
            rng.choice([str(rng.randrange(-9, 99)), rng.choice(quotes).format(rng.choice(contents))]) for _ in names
        ]
        space = rng.choice(["", " "])
        text = (
            f"do({space}"
            + f",{space}".join(f"{a}{space}={space}{b}" for a, b in zip(names, values, strict=True))
            + f"{space})"
        )
        call = read_call(text)
        assert call == python_call(text), text
        at = rng.randrange(len(text))
        broken = text[:at] + rng.choice(["", "'", ")", ",", "(", "="]) + text[at + 1 :]
        assert "\\" in broken or read_call(broken) in (None, python_call(broken)), broken
        read += call is not None
    assert read > 1900


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f(",
        "f)",
        "f(1)",
        "f(a)",
        "f(a=)",
        "f(a='x)",
        "f(a='x' b='y')",
        "f(a='x',,b='y')",
        "f(a='x', a='x')",
        "f(a=[1])",
        "f(a=1.5)",
        "f(a=None)",
        "f(a=f(b=1))",
        "f().g()",
        "f() g()",
        "1f()",
        "__import__('os').system('x')",
        "f(a='x');",
        "f(a='x'",
        "a b",
        "f(a=b'x')",
        "f(*a)",
    ],
)
def test_what_is_no_call(text: str) -> None:
    assert read_call(text) is None


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (L, L, 1),
        ("left_click(start_box='[500,500]')", L, 1),
        ("left_click(element_info='Cancel', start_box='[ 500 , 500 ]')", L, 1),
        ('left_click(start_box="[500,500]")', L, 1),
        ("left_click(start_box='[503,504]')", L, 0.95),
        ("left_click(start_box='[520,500]')", L, 0.8),
        ("left_click(start_box='[500,521]')", L, 1 - 21 / 50),
        ("left_click(start_box='[530,540]')", L, 0),
        ("left_click(start_box='[549,500]')", L, 1 / 50),
        ("left_click(start_box='[900,900]')", L, 0),
        ("left_click()", L, 0),
        ("left_click", L, 0),
        ("left_click(element_info='OK')", L, 0),
        ("left_click(start_box='500,500')", L, 0),
        ("left_click(start_box='[500]')", L, 0),
        ("left_click(start_box='[500,500,1]')", L, 0),
        ("left_click(start_box='[500.0,500]')", L, 0),
        ("left_click(start_box='[-500,500]')", L, 0),
        ("left_click(start_box=500)", L, 0),
        ("left_click(start_box='[500,500]', button='x')", L, 0),
        ("left_click(start_box='[500,500]') # here", L, 0),
        ("Left_click(start_box='[500,500]')", L, 0),
        ("left_double_click(start_box='[500,500]')", L, 0),
        ("left_click(start_box='[1001,500]')", "left_click(start_box='[1000,500]')", 0),
        ("hover(start_box='[0,0]')", "hover(start_box='[0,0]')", 1),
        (
            "left_drag(start_box='[100,100]', end_box='[300,300]')",
            "left_drag(end_box='[300,300]', start_box='[100,100]')",
            1,
        ),
        (
            "left_drag(start_box='[100,110]', end_box='[320,300]')",
            "left_drag(start_box='[100,100]', end_box='[300,300]')",
            math.sqrt(0.9 * 0.8),
        ),
        (
            "left_drag(start_box='[100,100]', end_box='[900,300]')",
            "left_drag(start_box='[100,100]', end_box='[300,300]')",
            0,
        ),
        (
            "left_drag(start_box='[300,300]', end_box='[100,100]')",
            "left_drag(start_box='[100,100]', end_box='[300,300]')",
            0,
        ),
        ("left_drag(start_box='[100,100]')", "left_drag(start_box='[100,100]', end_box='[300,300]')", 0),
        (S, S, 1),
        (S.replace("step=5", "step=8"), S, 0.7),
        (S.replace("step=5", "step=15"), S, 0),
        (S.replace("step=5", "step=100"), S, 0),
        (S.replace("step=5", "step=0"), S, 0.5),
        (S.replace("step=5", "step=-5"), S, 0),
        (S.replace("step=5", "step='5'"), S, 1),
        (S.replace("down", "up"), S, 0),
        (S.replace("down", "sideways"), S, 0),
        (S.replace("[500,500]", "[510,500]").replace("step=5", "step=8"), S, 0.9 * 0.7),
        ("scroll(start_box='[500,500]', direction='down')", S, 1),
        (S, "scroll(start_box='[500,500]', direction='down')", 1),
        (S.replace("step=5", "step=10"), "scroll(start_box='[500,500]', direction='down')", 1),  # it says of none
        ("scroll(direction='down', step=5)", S, 0),
        (S.replace("step=5", "step=0"), S.replace("step=5", "step=0"), 1),
        (S, S.replace("step=5", "step=0"), 0),  # nothing to divide by
        ("key(keys='ctrl+c')", "key(keys='Ctrl+C')", 1),
        ("key(keys='ctrl + c')", "key(keys='ctrl+c')", 1),
        ("key(keys='c+ctrl')", "key(keys='ctrl+c')", 0),
        ("key(keys='ctrl+v')", "key(keys='ctrl+c')", 0),
        ("key(keys='')", "key(keys='enter')", 0),
        ("hotkey(keys='ctrl+c')", "hotkey(keys='ctrl+c')", 1),
        ("type(content='hello')", "type(content='hello')", 1),
        ("type(content='Hello ')", "type(content='hello')", 1),
        ("type(content='it\\'s')", 'type(content="it\'s")', 1),
        ("type(content='a\\nb')", "type(content='a\nb')", 1),
        # one edit of five letters; he el ll lo against he el ll la: 3 of 5 pairs
        ("type(content='hella')", "type(content='hello')", 0.6 * 0.8 + 0.4 * 3 / 5),
        ("type(content='hello world')", "type(content='hello')", 0.6 * 5 / 11 + 0.4 * 4 / 10),
        ("type(content='xyz')", "type(content='abc')", 0),
        ("type(content='a')", "type(content='b')", 0),
        ("type(content='')", "type(content='b')", 0),
        ("type(content='')", "type(content='')", 1),
        ("type(content=5)", "type(content='5')", 0),
        ("type('hello')", "type(content='hello')", 0),
        ("DONE()", "DONE()", 1),
        ("DONE", "DONE()", 1),
        (" WAIT( ) ", "WAIT", 1),
        ("FAIL()", "DONE()", 0),
        ("done()", "DONE()", 0),
        ("DONE(x=1)", "DONE()", 0),
        ("", "DONE()", 0),
    ],
)
def test_desktop(answer: str, reference: str, score: float) -> None:
    assert outcome("gui_desktop", answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("left_click(start_box='[500,500]'", "is not a call"),
        ("", "is not a call"),
        ("lef_click(start_box='[5,5]')", "did you mean left_click"),
        ("left_click()", "wrong arguments"),
        ("scroll(start_box='[5,5]', direction='in')", "wrong arguments"),
        ("left_click(start_box='[5,1001]')", "wrong arguments"),
        ("key(keys=' ')", "wrong arguments"),
    ],
)
def test_wrong_reference_of_a_desktop_is_refused(reference: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        outcome("gui_desktop", "", reference)


# --- web pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        *(
            (text, "Click [5]", 1)
            for text in ("Click [5]", "Click 5", "Click [5].", "Click[5]", "Click [05]", " Click [5]\n")
        ),
        *(
            (text, "Click [5]", 0)
            for text in (
                "Click [6]",
                "Click [55]",
                "Click",
                "Click []",
                "Click [x]",
                "click [5]",
                "CLICK [5]",
                "Click [5",
                "Click 5]",
                "Click [5] [6]",
                "Click [-5]",
                "Click [5]; [a]",
                "I would Click [5]",
                "Type [5]; [a]",
            )
        ),
        ("Type [3]; [weather]", "Type [3]; [weather]", 1),
        *(
            (text, "Type [3]; [weather]", 1)
            for text in ("Type 3; weather", "Type [3] [weather]", "Type [3]; [ weather ].", "Type [3];weather")
        ),
        ("Type [3]; [Weather]", "Type [3]; [weather]", 6 / 7),
        ("Type [3]; [wether]", "Type [3]; [weather]", 6 / 7),
        ("Type [3]; [weather tomorrow]", "Type [3]; [weather]", 7 / 16),
        ("Type [4]; [weather]", "Type [3]; [weather]", 0),
        ("Type [3]; []", "Type [3]; [weather]", 0),
        ("Type [3]", "Type [3]; [weather]", 0),
        ("Type [3]; [xyz]", "Type [3]; [abc]", 0),
        ("Type [3]; []", "Type [3]; []", 1),
        ("Type [3]; [a[0]; b]", "Type [3]; [a[0]; b]", 1),
        ("Scroll [WINDOW]; [down]", "Scroll [WINDOW]; [down]", 1),
        ("Scroll WINDOW; down.", "Scroll [WINDOW]; [down]", 1),
        ("Scroll [WINDOW]; [up]", "Scroll [WINDOW]; [down]", 0),
        ("Scroll [3]; [down]", "Scroll [WINDOW]; [down]", 0),
        ("Scroll [3]; [down]", "Scroll [3]; [down]", 1),
        ("Scroll [3]; [left]", "Scroll [3]; [down]", 0),
        ("Key; [Return]", "Key; [Return]", 1),
        ("Key; return", "Key; [Return]", 1),
        ("Key; [Escape]", "Key; [Return]", 0),
        *((f"{word}{stop}", word, 1) for word in ("Wait", "GoBack", "Bing", "Google") for stop in ("", ".")),
        ("GoBack", "Wait", 0),
        ("Wait a moment", "Wait", 0),
        ("Go back", "GoBack", 0),
        ("ANSWER; <content>Paris</content>", "ANSWER; <content>Paris</content>", 1),
        ("ANSWER; <content>paris.</content>.", "ANSWER; <content>Paris</content>", 1),
        ("ANSWER; <content>no</content>", "ANSWER; <content>yes</content>", 0),
        ("ANSWER; <content></content>", "ANSWER; <content>yes</content>", 0),
        ("ANSWER; <content>in Paris, France</content>", "ANSWER; <content>Paris</content>", None),
        ("ANSWER; Paris", "ANSWER; <content>Paris</content>", 0),
        ("Paris", "ANSWER; <content>Paris</content>", 0),
    ],
)
def test_web(answer: str, reference: str, score: float | None) -> None:
    assert outcome("gui_web", answer, reference) == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize("reference", ["", "click 5", "I would click 5", "Type [3]", "Scroll [3]"])
def test_wrong_reference_of_a_page_is_refused(reference: str) -> None:
    with pytest.raises(RewardError, match="is not an action"):
        outcome("gui_web", "", reference)


# --- places -----------------------------------------------------------------------------------------------------------

PLACE = json.dumps({"place_name": "Eiffel Tower", "address": "Paris, France"})


def test_places_are_for_a_judge_unless_they_are_long() -> None:
    verifier, item = VERIFIERS["geoguess"], Item("", PLACE)
    verifier.check(item)
    assert verifier.score("Paris", item) == Ask("place")
    assert verifier.score("埃" * 50, item) == Ask("place")
    assert verifier.score(f" {'x' * 50}\n", item) == Ask("place")
    assert verifier.score("x" * 51, item) == Verdict(0.0, "too_long")
    assert verifier.score(" ", item) == Verdict(0.0, "empty")


@pytest.mark.parametrize(
    "reference",
    [
        "Paris",
        "{}",
        '{"place_name": "a"}',
        '{"place_name": "a", "address": 1}',
        '{"place_name": "a", "address": "b", "c": ""}',
    ],
)
def test_wrong_reference_of_a_place_is_refused(reference: str) -> None:
    with pytest.raises(RewardError, match="place_name"):
        VERIFIERS["geoguess"].check(Item("", reference))
