"""References that no answer could match are refused when data is built; the others score 1 as their own answer."""

from __future__ import annotations

import pytest

from rewards.table import verifier_named
from rewards.verdict import Ask, Item, RewardError, Verdict

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("verifier", "reference", "says"),
    [
        ("math", "", "is empty"),
        ("math", " \n", "is empty"),
        ("math", "\\frac{3}{", "braces that do not match"),
        ("math", "\\frac{3}}{4", "braces that do not match"),
        ("physics", "\\SI{5}{m", "braces that do not match"),
        ("chart", "1\x00", "control characters"),
        ("math", "x" * 6000, "6000 characters"),
        ("counting", "many", "no whole number"),
        ("counting", "7.5", "no whole number"),
        ("counting", "about 7", "leaves it open"),
        ("counting", "7 or 8", "no whole number"),
        ("counting", "-3", "no whole number"),
        ("vqa", ".", "is empty"),
        ("long_document", "。", "is empty"),
        ("video", "[20, 10]", "ends before it begins"),
        ("video", "[10, 10]", "has no length"),
        ("video", "0:20 - 0:10", "ends before it begins"),
        ("grounding", "[[0.1, 0.1, 0.3, 0.3]]", "fractions of the image"),
        ("grounding", "[[1,2,3]]", "not a list of boxes"),
        ("grounding", "[[300,300,100,100]]", "not a list of boxes"),
        ("grounding", "(1,1),(5,5),(6,6)", "not a list of boxes"),
        ("geoguess", "Paris", "place_name"),
        ("geoguess", '{"place_name": "", "address": " "}', "place_name"),
        ("gui_mobile", "{'action_type': 'click', 'box_2d': [1,2,3,4]}", "box_2d"),
        ("gui_mobile", "{'action_type': f()}", "no JSON object"),
        ("gui_desktop", "lef_click(start_box='[5,5]')", "did you mean left_click"),
        ("gui_desktop", "scroll(start_box='[5,5]', direction='sideways')", "wrong arguments"),
        ("gui_web", "CLICK(point=(214, 100))", "is not an action"),
        ("gui_web", "ANSWER;", "is not an action"),
        ("code", "def f(", "is no python"),
        ("instruction", "[]", "not a JSON list"),
    ],
)
def test_refused(verifier: str, reference: str, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        verifier_named(verifier).check(Item("", reference))


@pytest.mark.parametrize(
    ("verifier", "reference"),
    [
        ("math", "(1, 2\\}"),  # LaTeX's braces with a backslash are signs
        ("math", "\\left\\{ x \\mid x > 2 \\right\\}"),
        ("math", "[7, 8)"),
        ("counting", "none"),
        ("counting", "7 dogs"),
        ("counting", "[7]"),
        ("video", "3-2"),  # a result
        ("video", "10 s"),
        ("video", "[0.1, 0.3]"),
        ("grounding", "[[0, 0, 1000, 1000]]"),
        ("grounding", "[]"),
        ("ocr", ""),
        ("gui_mobile", "{'action_type': 'status', 'goal_status': 'complete'}"),
        ("gui_desktop", "scroll(start_box='[5,5]', direction='up')"),
        ("gui_web", "ANSWER; [42]"),
        ("geoguess", '{"place_name": "Eiffel Tower", "address": ""}'),
    ],
)
def test_taken(verifier: str, reference: str) -> None:
    item = Item("", reference)
    verifier_named(verifier).check(item)
    outcome = verifier_named(verifier).score(reference, item)
    assert isinstance(outcome, Ask) if verifier == "geoguess" else outcome == Verdict(1.0, outcome.reason)
