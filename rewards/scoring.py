"""From a response to a score: the form, the style, the verifier, and a judge where no rule decides.

task = Task(verifier_named("math"), Item("How many dots?", "7"), form="glm45v")
task.check()                                                       when data is built
scored = score_response("<think>..</think><|begin_of_box|>7<|end_of_box|>", task)
scored.outcome                                                     Verdict(1.0, "equal"), or Ask: then `settle`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from common.nearest import suggestion
from rewards.answer import FORMS, Form, boxed, split
from rewards.judge import Judge
from rewards.style import style_verdict
from rewards.verdict import Ask, Item, Outcome, RewardError, Verdict
from rewards.verifier import Verifier

WHOLE_TEXTS = frozenset({"instruction"})  # verifiers of all that follows the thought: a box in it is refused


@dataclass(frozen=True)
class Task:
    """How the responses to one prompt are scored."""

    verifier: Verifier
    item: Item
    form: Form = "either"
    thinking: bool = True  # whether a response must have a thought
    verifiable: bool = True  # false: no answer is right or wrong, a box is refused, and a judge decides

    def check(self) -> None:
        """Check it when data is built. Raises RewardError if the reference or a setting cannot be used."""
        check_form(self.form)
        if self.verifiable:
            self.verifier.check(self.item)


class Scored(NamedTuple):
    """What a response scored."""

    outcome: Outcome
    answer: str | None  # the final answer, or the text where nothing is verifiable; None if the response has none


def check_form(form: str) -> None:
    """Raise RewardError unless a form is known."""
    if form not in FORMS:
        raise RewardError(
            f"there is no form {form!r}{suggestion(form, FORMS) or ': the forms are ' + ', '.join(FORMS)}"
        )


def score_response(response: str, task: Task) -> Scored:
    """Score what a model wrote, by rules. Never raises."""
    parts = split(response, task.form, task.thinking)
    if isinstance(parts, Verdict):
        return Scored(parts, None)
    has_result = task.verifiable and task.verifier.name not in WHOLE_TEXTS
    answer = boxed(parts.text) if has_result else parts.text
    if isinstance(answer, Verdict):
        return Scored(answer, None)
    style = style_verdict(parts.thought, parts.text, has_result)
    return Scored(style or score_answer(answer, task), answer)


def score_answer(answer: str, task: Task) -> Outcome:
    """Score a final answer, by rules. Never raises."""
    return task.verifier.score(answer, task.item) if task.verifiable else Ask("not_verifiable")


def settle(outcome: Outcome, answer: str | None, item: Item, judge: Judge) -> Verdict:
    """Return the verdict of the rules, or that of a judge where they have none."""
    return outcome if isinstance(outcome, Verdict) else judge.verdict(item, answer or "", outcome)
