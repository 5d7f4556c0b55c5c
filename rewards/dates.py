"""Dates in an answer: "March 5, 2019", "5th of March 2019", "2019-03-05", "2019年3月5日", "Mar 2019", "March".

Dates of digits alone with the year last ("03/05/2019") are none: countries write day and month in another order.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rewards.plain_text import plain

MAX_CHARACTERS = 40
_MONTHS = "january february march april may june july august september october november december"
_NUMBER_OF = {
    "sept": 9,
    **{name[:length]: number for number, name in enumerate(_MONTHS.split(), 1) for length in (3, len(name))},
}
_MONTH = rf"(?P<month>{'|'.join(sorted(_NUMBER_OF, key=len, reverse=True))})\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"{_MONTH}(?: {_DAY})?(?:,? (?:of )?{_YEAR})?",
        rf"{_DAY}(?: of)?[ -]{_MONTH}(?:,?[ -]{_YEAR})?",
        rf"{_YEAR}[-/.](?P<month>\d{{1,2}})[-/.](?P<day>\d{{1,2}})",
        rf"(?:{_YEAR} ?年 ?)?(?P<month>\d{{1,2}}) ?月(?: ?(?P<day>\d{{1,2}}) ?[日号])?",
    )
)


class Date(NamedTuple):
    """A date; 0 for what is not written."""

    year: int
    month: int
    day: int


def date_in(text: str) -> Date | None:
    """Return the date that a text is; None if it is anything else.

    >>> date_in("March 5, 2019") == date_in("2019-03-05") == Date(2019, 3, 5)
    True
    """
    bare = plain(text) if len(text) <= MAX_CHARACTERS else ""
    found = next((match for form in _FORMS if (match := form.fullmatch(bare))), None)
    if found is None:
        return None
    parts = found.groupdict()
    month = _NUMBER_OF.get(parts["month"]) or int(parts["month"])
    date = Date(int(parts.get("year") or 0), month, int(parts.get("day") or 0))
    return date if 1 <= date.month <= 12 and date.day <= 31 else None
