"""Symbolic mathematics as a rule: what no other rule reads is compared by sympy, in a process that can be killed.

Reasons: symbolic, different, time_limit, memory_limit, too_large.
"""

from __future__ import annotations

import math
import re

from rewards import workers
from rewards.verdict import Verdict

MAX_CHARACTERS = 500
MAX_DEPTH = 30
MAX_DIGITS = 40  # of one number

MAX_TERMS = 10**6  # no number in an answer with a sum, product, binomial or factorial may be larger

_DIGITS = re.compile(rf"\d{{{MAX_DIGITS},}}")
_STRANGE = re.compile(r"[#@\"`?\x00-\x08\x0e-\x1f\x7f-\x9f\u2000-\u200f\u2028-\u202e\ud800-\udfff]")  # in no formula
_REPEATED = re.compile(r"\\(?:sum|prod|d?t?binom|bigcup|bigcap|choose)|!")
_NUMBER = re.compile(r"(\d+)(?:\s*\^\s*\{?\s*(\d+))?")


def same_by_symbols(given: str, wanted: str) -> Verdict | None:
    """Compare an answer with a reference, both in LaTeX; None if sympy cannot read one of them."""
    if _STRANGE.search(given) or _STRANGE.search(wanted):
        return None
    if len(given) > MAX_CHARACTERS or _depth(given) > MAX_DEPTH or _DIGITS.search(given) or _has_many_terms(given):
        return Verdict(0.0, "too_large")
    if len(wanted) > MAX_CHARACTERS or _depth(wanted) > MAX_DEPTH:
        return None
    said = workers.shared().compare(given, wanted)
    if said == "unreadable":
        return None
    return Verdict(1.0, "symbolic") if said == "same" else Verdict(0.0, said)


def _has_many_terms(text: str) -> bool:
    """Return whether a text repeats something, and has a number that could say how often, too large to be computed."""
    if not _REPEATED.search(text):
        return False
    limit = math.log(MAX_TERMS)
    return any(math.log(int(base) or 1) * int(power or 1) > limit for base, power in _NUMBER.findall(text))


def _depth(text: str) -> int:
    depth = most = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        most = max(most, depth)
    return most
