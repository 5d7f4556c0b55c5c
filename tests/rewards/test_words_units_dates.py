"""Fractions in words, sums of units, and dates: against the library's own calendar, pint, and fractions by hand."""

from __future__ import annotations

import datetime
import itertools
from fractions import Fraction
from typing import Any

import pint
import pytest

from rewards.dates import date_in
from rewards.short_numbers import short_number
from rewards.units import compound, unit
from rewards.words import leading_fraction, leading_number, word_number
from tests.rewards.judging import score

NAMES = {2: ("half", "halves"), 3: ("third", "thirds"), 4: ("quarter", "quarters"), 5: ("fifth", "fifths")}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.mark.fast
def test_fractions_in_words() -> None:
    for (below, (single, several)), (above, word) in itertools.product(NAMES.items(), enumerate(NUMBERS, 1)):
        text = f"{word} {single if above == 1 else several}"
        assert word_number(text) == word_number(text.replace(" ", "-")) == Fraction(above, below), text
        assert word_number(f"four and {text}") == 4 + Fraction(above, below)
    for text, number in (("half", "1/2"), ("A half", "1/2"), ("a third", "1/3"), ("一半", "1/2"), ("三分之二", "2/3")):
        assert word_number(text) == Fraction(number), text
    assert leading_number("half an hour") == (Fraction(1, 2), "hour")


@pytest.mark.fast
@pytest.mark.parametrize(
    "text", ["third", "the third", "twenty fifth", "two third", "one thirds", "second half", "behalf"]
)
def test_what_is_no_fraction(text: str) -> None:
    assert leading_fraction(text) is None


def test_sums_of_units_against_pint() -> None:
    registry: Any = pint.UnitRegistry()
    for text, parts in (
        ("1 h 30 min", ((1, "hour"), (30, "minute"))),
        ("2 hours and 5 minutes", ((2, "hour"), (5, "minute"))),
        ("1h20min5s", ((1, "hour"), (20, "minute"), (5, "second"))),
        ("3 km 200 m", ((3, "kilometer"), (200, "meter"))),
        ("5 ft 6 in", ((5, "foot"), (6, "inch"))),
        ("1小时30分", ((1, "hour"), (30, "minute"))),
    ):
        total = sum(registry.Quantity(number, name) for number, name in parts).to_base_units().magnitude
        found = compound(text)
        assert found is not None, text
        assert float(found[0]) * found[1].factor == pytest.approx(float(total), rel=1e-12)
    for text in ("1 h", "30 min 1 h", "1 h 30 kg", "1 h 30", "1 h 1 h", "1 x 2 y", ""):
        assert compound(text) is None, text
    assert score("physics", "1 h 30 min", "90 min") == 1
    assert score("physics", "1 h 31 min", "90 min") == 0
    assert score("vqa", "1 h 30 min", "1.5 hours") == 1


def test_what_follows_a_stroke_is_below_it() -> None:
    for text, same in (
        ("J/mol*K", "J/(mol*K)"),
        ("J/mol K", "J/(mol*K)"),
        ("L*atm/mol*K", "L atm mol^-1 K^-1"),
        ("m/s/s", "m/s^2"),
        ("kg*m/s^2", "N"),
        ("J/mol K^-1", "J/(mol*K)"),
        ("1/s", "Hz"),
        ("(m/s)*kg", "kg*m/s"),
    ):
        assert unit(text) == unit(same), text
        assert unit(text) is not None


@pytest.mark.fast
def test_dates_are_the_calendars() -> None:
    day = datetime.date(1999, 12, 28)
    for step in range(0, 800, 7):
        date = day + datetime.timedelta(days=step)
        wanted = (date.year, date.month, date.day)
        for form in ("%B %d, %Y", "%d %B %Y", "%b %d %Y", "%d. %b. %Y", "%Y-%m-%d", "%Y/%m/%d", "%Y年%m月%d日"):
            text = date.strftime(form).replace(". ", " ")
            assert date_in(text) == wanted, text
        assert date_in(date.strftime("%B %Y")) == (date.year, date.month, 0)
    for text in ("03/05/2019", "2019", "May be", "Marching 5", "2019-13-01", "March 41, 2019", "5", ""):
        assert date_in(text) is None, text


@pytest.mark.fast
@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("March 5th, 2019", "5 March 2019", 1),
        ("2019-03-05", "March 5, 2019", 1),
        ("March 6, 2019", "5 March 2019", 0),
        ("March 5", "March 5, 2019", None),  # nothing that contradicts
        ("$1.2 million", "1,200,000 dollars", 1),
        ("$5", "€5", None),
        ("$5", "$6", 0),
        ("2 million", "2", None),  # the question may ask for millions
        ("3 million", "2 million", 0),
        ("Paris or London", "Paris", 0),
        ("Rome or London", "Paris", None),
        ("1/0", "1", None),
        ("\\frac{1}{2}", "0.5", 1),
        ("\\frac{1}{3}", "0.5", 0),
        ("1+x", "x+1", 1),
        ("-5", "2010-2015", None),  # a range is no difference
        ("e-mail", "email", 1),
        ("C++", "C", None),
    ],
)
def test_short_answers(answer: str, reference: str, wanted: float | None) -> None:
    assert score("vqa", answer, reference) == wanted


@pytest.mark.fast
def test_points_and_boxes_are_for_spatial_answers() -> None:
    assert score("spatial", "(500, 500)", "[500, 500]") == 1
    assert score("spatial", "[100,100,300,300]", "[[100, 100, 300, 300]]") == 1
    assert score("spatial", "(500, 510)", "[500, 500]") == 0
    assert score("spatial", "(500, 510)", "[500, 500]", tolerance=0.05) == 1
    assert score("vqa", "(1, 2)", "[1, 2]") is None  # intervals, open and closed


@pytest.mark.fast
def test_currency_is_a_noun() -> None:
    found = short_number("$1,200.50")
    assert found is not None
    assert (found.number, found.noun) == (Fraction("1200.5"), "dollar")
