"""gui_web: WebVoyager's actions on a page whose elements are numbered.

    Click [5]                                  Wait   GoBack   Bing   Google
    Type [3]; [weather]                        Key; [Return]
    Scroll [5 or WINDOW]; [up or down]         ANSWER; <content>42</content>   or   ANSWER; [42]

Action and element must be the same. A typed text scores common subsequence / length of the longer; all else is 1 or 0.
Brackets and a final stop may be omitted. The content of an ANSWER is for a reader: equal or decided as `general`
decides, else a judge is asked.

Reasons: no_action, action, element, equal, different, text, and those of `rewards.verifiers.text`. A judge is asked
for: text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewards.plain_text import composed
from rewards.similarity import common_subsequence
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings
from rewards.verifiers.text import compare

MAX_CHARACTERS = 20_000
_ELEMENT = r"(?:\[ {0,3}(?P<element>\d{1,6}|WINDOW) {0,3}\]|(?P<element_bare>\d{1,6}|WINDOW))"
_THEN = r"(?: {0,3}; {0,3}| {1,3})"
_CONTENT_TAG = "<content>"
_CONTENT = r"\[(?P<value_open>[^\n]*)\]\.?|(?P<value_bare>[^\[<\n][^\n]*)"
# One text per action: a pattern, where `value` is what is compared.
FORMS: Mapping[str, re.Pattern[str]] = {
    action: re.compile(pattern, re.DOTALL)
    for action, pattern in {
        "Click": rf"Click {{0,3}}{_ELEMENT}\.?",
        "Type": rf"Type {{0,3}}{_ELEMENT}{_THEN}(?:\[(?P<value>.*)\]\.?|(?P<value_bare>[^\[].*))",
        "Scroll": rf"Scroll {{0,3}}{_ELEMENT}{_THEN}(?:\[(?P<value>up|down)\]|(?P<value_bare>up|down))\.?",
        "Key": rf"Key{_THEN}(?:\[(?P<value>[^][]*)\]|(?P<value_bare>[^][]+?))\.?",
        "ANSWER": rf"ANSWER{_THEN}(?:<content>(?P<value>.*)</content>\.?|{_CONTENT})",
        **{word: rf"{word}\.?" for word in ("Wait", "GoBack", "Bing", "Google")},
    }.items()
}


class GuiWeb:
    """An action on a web page."""

    name = "gui_web"
    settings: Mapping[str, Any] = {}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        if read_action(item.reference) is None:
            raise RewardError(
                f"gui_web: the reference {item.reference[:100]!r} is not an action; the actions are {', '.join(FORMS)}"
            )

    def score(self, answer: str, item: Item) -> Outcome:
        given, wanted = read_action(answer), read_action(item.reference)
        if given is None or wanted is None:
            return Verdict(0.0, "no_action")
        if given[0] != wanted[0]:
            return Verdict(0.0, "action")
        if given[0] == "ANSWER" and _CONTENT_TAG in item.reference and _CONTENT_TAG not in answer:
            return Verdict(0.0, "no_action")  # the form that the reference has is the one that is read
        if given[1] != wanted[1]:
            return Verdict(0.0, "element")
        if given[2] == wanted[2]:
            return Verdict(1.0, "equal")
        if wanted[0] == "Type":
            return Verdict(common_subsequence(given[2], wanted[2]), "text")
        if wanted[0] == "ANSWER":
            return compare(given[2], wanted[2])
        return Verdict(0.0, "different")


def read_action(text: str) -> tuple[str, str, str] | None:
    """Return action, element and value of a text; None if it is no action.

    >>> read_action("Type 3; [weather]"), read_action("I would click 5")
    (('Type', '3', 'weather'), None)
    """
    text = composed(text.strip()) if len(text) <= MAX_CHARACTERS else ""
    for action, form in FORMS.items():
        if found := form.fullmatch(text):
            groups = {name: value for name, value in found.groupdict().items() if value is not None}
            element = groups.get("element", groups.get("element_bare", ""))
            value = groups.get("value", groups.get("value_open", groups.get("value_bare", ""))).strip()
            return action, element.lstrip("0") or element[:1], value.casefold() if action == "Key" else value
    return None
