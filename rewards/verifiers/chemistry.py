"""chemistry: formulas by their atoms, charge and state; equations up to order and arrow; else as physics.

A state counts only where answer and reference have one. Condensed formulas that show other functional groups may be
isomers: a judge is asked. So is a name against a formula.

Settings: as physics. Reasons beside its: formula; a judge is asked for: isomers.
"""

from __future__ import annotations

import re

from rewards import choices, formulas
from rewards.notation import MAX_CHARACTERS, tidy
from rewards.verdict import Ask, Item, Outcome, Verdict
from rewards.verifier import setting
from rewards.verifiers.physics import Physics

_RAISED = re.compile(r"(?<=[A-Za-z])(?:[\^_]\s*(?:\{\s*(\d+)\s*\}|(\d+))|(\d+))\s*")  # behind a letter: not in 10^3
_NAMED = re.compile(r"^\s*[A-Za-z]{1,12}\s*[:=]\s*(?=[-+.\d])")  # "pH = 7"


class Chemistry(Physics):
    """Compares answers in chemistry."""

    name = "chemistry"

    def score(self, answer: str, item: Item) -> Outcome:
        if len(answer) <= MAX_CHARACTERS and not self._asks_for_option(item):
            outcome = _formulas(tidy(answer), tidy(item.reference))
            if outcome is not None:
                return outcome
            said, right = _NAMED.match(answer), _NAMED.match(item.reference)
            if said and right and _name(said[0]) != _name(right[0]):
                return Verdict(0.0, "different")
            if said or right:  # the name before a number may be absent
                item = Item(item.question, _NAMED.sub("", item.reference), item.settings)
                return super().score(_NAMED.sub("", answer), item)
        return super().score(answer, item)

    def _asks_for_option(self, item: Item) -> bool:
        return bool(setting(self, item, "options") or choices.of_question(item.question))


def _name(text: str) -> str:
    return re.split("[:=]", text)[0].strip()


def _flat(text: str) -> str:
    """Return a text with raised digits on the line: "sp^3" and "sp3", "1s^{2}2s^{2}" and "1s2 2s2" are the same."""
    return _RAISED.sub(r"\1\2\3 ", text).rstrip()


def _formulas(given: str, wanted: str) -> Outcome | None:
    """Decide two formulas or two equations; None if the reference is neither."""
    if (right := formulas.reaction(wanted)) is not None:
        said = formulas.reaction(given)
        if said is None:
            return Verdict(0.0, "different") if formulas.substance(given) else Ask("text")
        return Verdict(1.0, "equation") if formulas.same_reaction(said, right) else Verdict(0.0, "different")
    if (substance := formulas.substance(wanted)) is None:
        same = _flat(given) == _flat(wanted) and re.search("[A-Za-z]", wanted)
        return Verdict(1.0, "equal") if same else None
    if (answer := formulas.substance(given)) is None:
        if choices.letters(given) and len(wanted) == 1:
            return None
        return (
            Verdict(0.0, "different") if formulas.reaction(given) or re.fullmatch(r"[-+.\d]*", given) else Ask("text")
        )
    if not answer.same(substance):
        return Verdict(0.0, "different")
    if None not in (answer.groups, substance.groups) and answer.groups != substance.groups:
        return Ask("isomers")
    return Verdict(1.0, "formula")
