"""The open cases of every verifier: scores by rule, and where a judge is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.table import VERIFIERS
from rewards.verdict import Ask, Item, Verdict

pytestmark = pytest.mark.fast

CASES = json.loads((Path(__file__).parent / "cases.json").read_text(encoding="utf-8"))
OF_VERIFIERS = [case for case in CASES if case["domain"] in VERIFIERS and "answer" in case]


@pytest.mark.parametrize("case", OF_VERIFIERS, ids=lambda case: case["id"])
def test_open_case(case: dict[str, Any]) -> None:
    verifier = VERIFIERS[case["domain"]]
    item = Item(case.get("question", ""), case["reference"], case.get("settings", {}))
    verifier.check(item)
    outcome = verifier.score(case["answer"], item)
    if case["stage"] == "judge":
        assert isinstance(outcome, Ask)
    else:
        assert isinstance(outcome, Verdict)
        assert outcome.score == pytest.approx(case["expected"], abs=case["tolerance"] or 1e-12)
