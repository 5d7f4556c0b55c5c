"""Charts and counting: each rule in both directions."""

from __future__ import annotations

import pytest

from rewards.table import verifier_named
from rewards.verdict import Item, RewardError
from tests.rewards.judging import score

pytestmark = pytest.mark.fast

CHART = [
    ("What was it?", "102.4", "100", 1),
    ("What was it?", "102.6", "100", 0),
    ("What was it?", "97.4", "100", 0),
    ("What was it?", "-100", "100", 0),
    ("What was it?", "0.001", "0", 0),
    ("How many units?", "1020", "1000", 1),
    ("How many units?", "2014", "2015", 1),
    ("In which year?", "2014", "2014", 1),
    ("In which year?", "in 2014", "2014", 1),
    ("In which year?", "2015", "2014", 0),
    ("When did it peak?", "2013", "2014", 0),
    ("In the year 2014, what was the income?", "1520", "1500", 1),
    ("How many were sold when the price was lowest?", "1520", "1500", 1),
    ("What year did sales peak?", "2013", "2014", 0),
    ("Which years?", "2012, 2010", "2010, 2012", 1),
    ("Which years?", "2010, 2013", "2010, 2012", 0),
    ("What was the revenue, in millions?", "1.2", "1200000", 1),
    ("What was the revenue, in millions?", "1.3", "1200000", 0),
    ("哪一年最高?", "2013年", "2014", 0),
    ("哪一年最高?", "2014年", "2014", 1),
    ("What share, in %?", "12.5", "12.5%", 1),
    ("What share, in percent?", "12.7%", "12.5", 1),
    ("What share?", "12.5%", "0.125", 1),
    ("What is it?", "12.5%", "12.5", 0),
    ("Revenue?", "1.2M", "1200000", 1),
    ("Revenue?", "$1,200,000", "1.2 million", 1),
    ("Revenue?", "1.2 billion", "1200000", 0),
    ("Revenue in millions?", "1.2 million", "1.2", 1),
    ("Revenue?", "1.2 million", "1.2", 0),
    ("Revenue?", "120万", "1200000", 1),
    ("Length?", "5 km", "5", 1),
    ("Ratio?", "1/2", "0.5", 1),
    ("How many?", "seven", "7", 1),
    ("How many?", "about 100", "100", 0),
    ("Is A larger?", "yes", "true", 1),
    ("Is A larger?", "T", "yes", 1),
    ("Is A larger?", "1", "Yes", 1),
    ("Is A larger?", "Yes", "1", 1),
    ("Is A larger?", "No", "True", 0),
    ("Is A larger?", "0", "Yes", 0),
    ("Which colour?", "BLUE", "blue", 1),
    ("Which colour?", "light blue", "blue", None),
    ("Which country?", "China", "Japan", None),
    ("Which series?", "B", "A", 0),
    ("Which series?", "A or B", "A", 0),
    ("Which years?", "from 2010 to 2015", "2010-2015", None),
    ("Which years?", "-5", "2010-2015", None),
    ("How long?", "5 m", "5", 1),
    ("How long?", "6 m", "5", 0),
    ("How many?", "1 2", "12", 0),
    ("Which two?", "USA and China", "China, USA", 1),
    ("Which two?", "[B, A]", "A, B", 1),
    ("Which two?", "A", "A, B", 0),
    ("Which two?", "A, B, C", "A, B", 0),
    ("Which two?", "A, C", "A, B", 0),
    ("Which two?", "China, Nippon", "China, Japan", None),
    ("Which values?", "20.2, 10", "10, 20", 1),
    ("Which values?", "10, 30", "10, 20", 0),
    ("List them in ascending order.", "B, A", "A, B", 0),
    ("List them in ascending order.", "A, B", "A, B", 1),
]
COUNTS = [
    ("8", "7", 0),
    ("7.5", "7", 0),
    ("07", "7", 1),
    ("1,000", "1000", 1),
    ("７", "7", 1),
    ("SEVEN.", "7", 1),
    ("七", "7", 1),
    ("七个", "7", 1),
    ("两个", "2", 1),
    ("一百二十三", "123", 1),
    ("twenty one dogs", "21", 1),
    ("a dozen", "12", 1),
    ("共有7个", "7", 1),
    ("一共有12个人。", "12", 1),
    ("一亿二千万", "120000000", 1),
    ("一万亿", "1000000000000", 1),
    ("三万零五", "30005", 1),
    ("There are 7 apples.", "7", 1),
    ("There are seven apples", "7", 1),
    ("7 (seven)", "7", 1),
    ("eight apples", "7", 0),
    ("none", "0", 1),
    ("no apples", "0", 1),
    ("no apples", "7", 0),
    ("6-8", "7", 0),
    ("between 6 and 8", "7", 0),
    ("about 7", "7", 0),
    ("~7", "7", 0),
    ("7+", "7", 0),
    ("at least 7", "7", 0),
    ("7 or so", "7", 0),
    ("not 7", "7", 0),
    ("不到七个", "7", 0),
    ("六或七", "7", 0),
    ("7 8", "7", 0),
    ("7 7", "7", 0),
    ("7%", "7", 0),
    ("7x", "7", 0),
    ("print(7)", "7", 0),
    ("-7 apples", "7", 0),
    ("many", "7", 0),
    ("", "7", 0),
    ("3 red and 4 blue", "7", None),
]


@pytest.mark.parametrize(("question", "answer", "reference", "expected"), CHART)
def test_chart(question: str, answer: str, reference: str, expected: float | None) -> None:
    assert score("chart", answer, reference, question) == expected


@pytest.mark.parametrize(("answer", "reference", "expected"), COUNTS)
def test_counting(answer: str, reference: str, expected: float | None) -> None:
    assert score("counting", answer, reference) == expected


def test_reference_of_a_count_must_be_whole() -> None:
    with pytest.raises(RewardError, match=r"'7\.5' is no whole number"):
        verifier_named("counting").check(Item("", "7.5"))
