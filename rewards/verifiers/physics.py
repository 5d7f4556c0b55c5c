"""physics: quantities, whose units decide; laws; else as math.

"72 km/h" is "20 m/s", "5 N·m" is "5 J", "5 cm" is not "5 m". Where only one of answer and reference has a unit, numbers
that differ score 0, and equal ones are left to a judge, unless the question names the unit that is missing.

Settings: tolerance (1e-5), ordered, options. Reasons beside those of math: other_unit; a judge is asked for:
unit_missing, unit_added, unknown_unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewards import quantity
from rewards.notation import tidy
from rewards.quantity import Quantity
from rewards.units import Unit, unit
from rewards.verdict import Ask, Item, Outcome, Verdict
from rewards.verifiers.mathematics import Mathematics
from rewards.words import HEDGE

_UNIT_IN_QUESTION = re.compile(
    r"\bin (?:units of )?([A-Za-zμΩ°/*^0-9 ]{1,30})|\(([A-Za-zμΩ°/*^0-9 {}-]{1,20})\)"
    r"|单位(?:是|为)?\s*([^,。?？)）]{1,10})"
)


_PLAIN_NUMBER = r"\d{1,15}(?:\.\d{1,15})?(?:[eE][-+]?\d{1,3})?"
_UNCERTAIN = re.compile(rf"\(?\s*(?P<value>-?{_PLAIN_NUMBER})\s*±\s*(?P<range>{_PLAIN_NUMBER})\s*\)?\s*(?P<rest>.*)")


class Physics(Mathematics):
    """Compares answers in physics."""

    name = "physics"
    settings: Mapping[str, Any] = {**Mathematics.settings, "tolerance": 1e-5}

    def measured(self, given: str, wanted: str, item: Item) -> Outcome | None:
        """Decide two quantities, or ask a judge where one of them lacks its unit."""
        if (pairs := _uncertain(given, wanted)) is not None:
            same = all(quantity.compare(one, other, self.rules(item).tolerance) == "same" for one, other in pairs)
            return Verdict(float(same), "quantity" if same else "different")
        one, other = quantity.read(given), quantity.read(wanted)
        if other is None or (one is None and other.unit is None):
            return None
        if one is None:
            return _unread(given)
        if one.unit is None and other.unit is None:
            return None
        return self._quantities(one, other, item)

    def _quantities(self, one: Quantity, other: Quantity, item: Item) -> Outcome:
        if (one.unit is None) != (other.unit is None):
            named = _unit_of_question(tidy(item.question))
            if named and (other.unit is None or named.dimension == other.unit.dimension):
                one, other = (Quantity(side.number, side.unit or named) for side in (one, other))
        said = quantity.compare(one, other, self.rules(item).tolerance)
        if said in ("unit_missing", "unit_added"):
            return Ask(said)
        return (
            Verdict(1.0, "quantity")
            if said == "same"
            else Verdict(0.0, "other_unit" if said == "unit" else "different")
        )


def _uncertain(given: str, wanted: str) -> list[tuple[Quantity, Quantity]] | None:
    """Return the values and the uncertainties of "9.81 ± 0.01 m/s^2", answer and reference; None for other texts."""
    sides: list[list[Quantity]] = []
    for text in (given, wanted):
        found = _UNCERTAIN.fullmatch(text) if "±" in text else None
        read = [quantity.read(f"{found[part]} {found['rest']}".strip()) for part in ("value", "range")] if found else []
        if not read or any(side is None or side.unit is None for side in read):
            return None
        sides.append([side for side in read if side is not None])
    return list(zip(*sides, strict=True))


def _unread(given: str) -> Outcome | None:
    """Decide an answer that is no quantity, where one with a unit is wanted."""
    if HEDGE.search(given) and not re.search(r"\d\s*[-+]\s*\d", given):
        return Verdict(0.0, "hedged")
    return Ask("unknown_unit") if re.match(r"[-+]?[\d.]", given) else None


def _unit_of_question(question: str) -> Unit | None:
    """Return the unit that a question asks for, as "in m/s" or "(m/s)"; None if it names none, or several."""
    found = set[Unit]()
    for match in _UNIT_IN_QUESTION.finditer(question[:2000]):
        words = (match[1] or match[2] or match[3]).strip().split()
        for length in range(min(len(words), 4), 0, -1):
            if (named := unit(" ".join(words[:length]))) is not None:
                found.add(named)
                break
    return next(iter(found)) if len(found) == 1 else None
