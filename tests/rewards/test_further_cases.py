"""Cases of every domain beyond the open ones: other spellings, units, forms and near misses.

Their scores were written down by reading the answers, before any verifier had seen them. They are scored as the
command scores a file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards.records import Line
from rewards.registry import Registry
from rewards.score import scored_line

CASES = json.loads((Path(__file__).parent / "further_cases.json").read_text(encoding="utf-8"))
DOMAINS = sorted({case["domain"] for case in CASES})


def test_there_are_cases_of_all_domains() -> None:
    assert len(DOMAINS) == 26
    assert len(CASES) >= 1_800


@pytest.mark.parametrize("domain", DOMAINS)
def test_domain(domain: str) -> None:
    wrong = []
    for number, case in enumerate(CASES, 1):
        if case["domain"] == domain:
            scored = scored_line(Line(number, case), Registry(), {})
            if not scored["as_expected"]:
                wrong.append((case["id"], case["why"], case["expected"], scored["score"], scored["reason"]))
    assert not wrong
