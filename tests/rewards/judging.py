"""What tests of verifiers share: the outcome of a rule, written as a number or None for a judge."""

from __future__ import annotations

from typing import Any

from rewards.table import verifier_named
from rewards.verdict import Item, Verdict


def score(verifier: str, answer: str, reference: str, question: str = "", **settings: Any) -> float | None:
    """Return the score of an answer by rules; None where a judge is asked."""
    item = Item(question, reference, settings)
    found = verifier_named(verifier)
    found.check(item)
    outcome = found.score(answer, item)
    return outcome.score if isinstance(outcome, Verdict) else None
