"""Answers in mathematics: each rule in both directions, and numbers in many forms against Python's fractions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import sympy

from rewards.evaluate import compare, value
from rewards.expression import parse
from rewards.notation import tidy
from rewards.table import verifier_named
from rewards.verdict import Item, RewardError
from tests.rewards.judging import score

pytestmark = pytest.mark.fast

RIGHT = [
    ("42.0", "42"),
    ("−5", "-5"),
    ("1e3", "1000"),
    ("1,000", "1000"),
    ("1 000 000", "10^6"),
    ("1{,}234", "1234"),
    ("1.234.567,5", "1234567.5"),
    ("50%", "0.5"),
    ("5\\%", "0.05"),
    ("72°", "72"),
    ("72", "72^{\\circ}"),
    ("90 degrees", "90°"),
    ("1\\frac12", "3/2"),
    ("-1½", "-1.5"),
    ("3:4", "6:8"),
    ("5!", "120"),
    ("\\log_{2}8", "3"),
    ("\\binom{5}{2}", "10"),
    ("\\frac{\\sqrt{3}}{2}", "\\sin 60°"),
    ("2√2", "\\sqrt{8}"),
    ("3+4i", "4i+3"),
    ("+3", "3"),
    ("-0", "0"),
    ("seven", "7"),
    ("七", "7"),
    ("twenty-one", "21"),
    ("\\text{7}", "7"),
    ("$\\frac{1}{2}$", "0.5"),
    ("\\(x+1\\)", "1 + x"),
    ("$1,200", "1200"),
    ("1200 dollars", "1200"),
    ("7 cm", "7"),
    ("7", "7 cm"),
    ("700 cm", "7 m"),
    ("1.0000005", "1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\frac{x^2-1}{x-1}", "x+1"),
    ("2\\sin x\\cos x", "\\sin 2x"),
    ("a\\cdot b", "ba+0"),
    ("{3,2,1}", "\\{1,2,3\\}"),
    ("{1,1,2}", "{1,2}"),
    ("(1, 2)", "(1,2)"),
    ("2; 1", "1, 2"),
    ("±2", "{2,-2}"),
    ("2, -2", "±2"),
    ("x = 1 ± √2", "1+√2, 1-√2"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("x=-3 or x=1", "x=1, x=-3"),
    ("x=1, -3", "x=-3, x=1"),
    ("x=3,y=4", "y=4, x=3"),
    ("(-\\infty,2)\\cup(3,\\infty)", "x<2 or x>3"),
    ("(3,∞)∪(-∞,2)", "x<2 or x>3"),
    ("0<x<1", "(0,1)"),
    ("1>x>0", "0<x<1"),
    ("x\\in[0,1)", "0\\le x<1"),
    ("\\{x|x>5\\}", "(5,∞)"),
    ("y≠0", "(-∞,0)∪(0,∞)"),
    ("all real numbers", "(-∞,∞)"),
    ("y=2x+1", "2x-y+1=0"),
    ("y=2x+1", "2x+1"),
    ("Yes", "yes"),
    ("true", "Yes"),
    ("(B)", "B"),
    ("b", "B"),
    ("Option B", "(B)"),
    ("B. 12", "B"),
    ("(A) 3.0", "A. 3"),
    ("BA", "AB"),
    ("A and C", "AC"),
    ("(A) and (C)", "AC"),
    ("The answer is 5", "5"),
    ("= 5", "5"),
    ("50 percent", "50%"),
    ("1.5 million", "1500000"),
    ("∛27", "3"),
    ("\\angle A = 30^\\circ", "30°"),
    ("5 square units", "5"),
    ("no solution", "\\emptyset"),
    ("Increasing", "increasing"),
    ("seven", "7 cm"),
    ("7", "seven"),
    ("6万", "60000"),
    ("1.2 亿", "120000000"),
    ("5m-3", "-3+5m"),
    ("3+2m", "2m+3"),
    ("2+\\sqrt{3} cm", "2+\\sqrt{3}"),
    ("seven cm", "7 cm"),
    ("5$", "5"),
    ("pi", "\\pi"),
    ("-infinity", "-\\infty"),
    ("\\frac{\\pi}{6}", "30°"),
    ("30°", "\\frac{\\pi}{6}"),
    ("-1<x and x<5", "(-1,5)"),
    ("x>5, y>2", "y>2, x>5"),
    ("[1, 3]", "1, 3"),
    ("3 \\times 4 = 12", "12"),
    ("1.\\overline{3}", "4/3"),
    ("0.1\\dot{6}", "1/6"),
    ("0.\\dot{1}4285\\dot{7}", "1/7"),
    ("\\theta", "θ"),
    ("2\\sin\\alpha\\cos\\alpha", "\\sin 2α"),
    ("\\lambda>5", "λ>5"),
    ("1.5x10^3", "1500"),
    ("1.5 x 10^{-3}", "0.0015"),
]
WRONG = [
    ("", "3"),
    ("50", "50%"),
    ("3.14", "\\pi"),
    ("1/3", "0.3333"),
    ("1.000002", "1"),
    ("8 cm", "7"),
    ("7 cm", "7 m"),
    ("7 m", "7 s"),
    ("7 or 8", "7"),
    ("7, 8", "7"),
    ("about 7", "7"),
    ("between 6 and 8", "7"),
    ("at least 7", "7"),
    ("eight", "7"),
    ("8 apples", "7"),
    ("1.5 billion", "1500000"),
    ("-\\infty", "\\infty"),
    ("5!", "5"),
    ("3 4", "3"),
    ("0x3", "3"),
    ("nan", "3"),
    ("inf", "3"),
    ("None", "3"),
    ("{0.__class__}", "3"),
    ("2x", "x^2"),
    ("x", "y"),
    ("(2,1)", "(1,2)"),
    ("{1,2}", "(1,2)"),
    ("{1,2,3}", "{1,2}"),
    ("x=2", "x=±2"),
    ("y=5", "x=5"),
    ("x=4,y=3", "x=3,y=4"),
    ("[0,1)", "[0,1]"),
    ("x>6", "x>5"),
    ("x<5", "x>5"),
    ("y>5", "x>5"),
    ("C", "B"),
    ("ABC", "AB"),
    ("A", "AB"),
    ("no", "yes"),
    ("H", "x"),
    ("\\alpha", "β"),
    ("2 1/2", "21/2"),
    ("5 6", "56"),
    ("3+2m", "5m"),
    ("6万", "6"),
    ("eight apples", "7"),
    ("8", "seven"),
    ("A or B", "A"),
    ("(A) 4", "(A) 3"),
    ("pi", "3"),
    ("\\frac{\\pi}{3}", "30°"),
    ("x>5 and x<1", "(1,5)"),
    ("x>1, y>2", "x>1"),
    ("[1, 3]", "1, 4"),
    ("3 \\times 4 = 13", "13"),
    ("0.\\overline{3}", "0.3"),
]
UNDECIDED = [
    ("decreasing", "increasing"),
    ("7 apples", "7"),
    ("seven apples", "7"),
    ("0", "none"),
    ("no solution", "none"),
    ("(A) the square", "(A) a square"),
    ("12", "B"),
    ("one more than x", "x+1"),
    ("\\sqrt{x^2}", "x"),
    ("1, 2, 3, ...", "1, 2, 3"),
    ("x is greater than 5", "(5,\\infty)"),
]


@pytest.mark.parametrize(("answer", "reference"), RIGHT)
def test_same_answer_in_another_form(answer: str, reference: str) -> None:
    assert score("math", answer, reference) == 1


@pytest.mark.parametrize(("answer", "reference"), WRONG)
def test_other_answer(answer: str, reference: str) -> None:
    assert score("math", answer, reference) == 0


@pytest.mark.parametrize(("answer", "reference"), UNDECIDED)
def test_what_rules_do_not_decide_is_for_a_judge(answer: str, reference: str) -> None:
    assert score("math", answer, reference) is None


def test_what_the_question_asks_for_decides() -> None:
    assert score("math", "50", "50%", "How many per cent?") == 1
    assert score("math", "50", "50%", "Which share?") == 0
    assert score("math", "2, 1", "1, 2", "Find all solutions.") == 1
    assert score("math", "2, 1", "1, 2", "Write them in ascending order.") == 0
    assert score("math", "2, 1", "1, 2", ordered=True) == 0


@pytest.mark.parametrize(
    ("question", "settings"),
    [("How many? (A) 3 (B) 4 (C) 5", {}), ("How many?\nA. 3\nB. 4\nC. 5", {}), ("", {"options": ["3", "4", "5"]})],
)
def test_option_is_its_letter_or_its_content(question: str, settings: dict[str, object]) -> None:
    for reference in ("B", "4"):
        right = {answer: score("math", answer, reference, question, **settings) for answer in ("B", "4", "4.0", "B) 4")}
        assert set(right.values()) == {1.0}, right
        wrong = {answer: score("math", answer, reference, question, **settings) for answer in ("A", "3", "C. 5", "AB")}
        assert set(wrong.values()) == {0.0}, wrong
    assert score("math", "B. 5", "B", question, **settings) == 0  # letter and content contradict each other
    assert score("math", "B. 7", "B", question, **settings) == 0
    assert score("math", "B. the second", "B", question, **settings) is None


def test_tolerance_is_a_setting() -> None:
    assert score("math", "1.01", "1", tolerance=0.02) == 1
    assert score("math", "1.03", "1", tolerance=0.02) == 0


@pytest.mark.parametrize(
    ("reference", "settings", "said"),
    [
        (" ", {}, "the reference is empty"),
        ("1", {"tolerence": 1}, "no setting 'tolerence': did you mean tolerance?"),
        ("1", {"tolerance": "high"}, "the setting tolerance is 'high', not of type float"),
        ("A", {"options": 7}, "options: 7 is neither a list nor a mapping"),
    ],
)
def test_check_names_what_is_wrong(reference: str, settings: dict[str, object], said: str) -> None:
    with pytest.raises(RewardError, match=said):
        verifier_named("math").check(Item("", reference, settings))


# --- against other truths ---------------------------------------------------------------------------------------------


def forms(number: Fraction, rng: random.Random) -> list[str]:
    """Return a number in forms that must all be the same; its denominator divides a power of ten."""
    sign, size = "-" if number < 0 else "", abs(number)
    decimal = f"{float(size):.6f}".rstrip("0").rstrip(".")
    whole, rest = divmod(size.numerator, size.denominator)
    texts = [
        decimal,
        f"{float(size):,.6f}",
        f"{size.numerator}/{size.denominator}",
        f"\\frac{{{size.numerator}}}{{{size.denominator}}}",
        f"\\dfrac {{{size.numerator}}} {{{size.denominator}}}",
        f"{float(size) * 100:.4f}%",
        f"{float(size):.10e}",
        f"{float(size) / 1000:.9f} \\times 10^{{3}}",
        f"{float(size) * 1000:.4f}×10⁻³",
        f"$ {decimal} $",
        f"\\text{{{decimal}}}",
        f"{decimal}.",
    ]
    if rest and whole:
        texts += [f"{whole} {rest}/{size.denominator}", f"{whole}\\frac{{{rest}}}{{{size.denominator}}}"]
    return [
        f"{rng.choice(['-', '−', '- ']) if sign else ''}{text}" if text[0] not in "$\\t" else text for text in texts
    ]


def test_random_numbers_in_many_forms_are_equal_and_their_neighbours_are_not() -> None:
    rng = random.Random(1)
    for _ in range(120):
        number = Fraction(rng.randint(1, 10**6), rng.choice([1, 2, 4, 5, 8, 10, 20, 100]))
        other = number * Fraction(rng.choice([999, 1001]), 1000)
        for text in forms(number, rng):
            assert score("math", text, f"{float(number)!r}") == 1, (text, number)
            assert score("math", text, str(other)) == 0, (text, other)
            assert score("math", f"-{text}" if text[0].isdigit() else "x", f"{float(number)!r}") == 0


def test_negative_numbers_in_many_forms() -> None:
    rng = random.Random(2)
    for _ in range(100):
        number = -Fraction(rng.randint(1, 10**5), rng.choice([1, 2, 4, 5, 8]))
        for text in forms(number, rng):
            if text[0] in "-−":
                assert score("math", text, f"{float(number)!r}") == 1, (text, number)


def test_values_are_sympys() -> None:
    x = sympy.Symbol("x")
    rng = random.Random(3)
    atoms = [x, sympy.Integer(2), sympy.Rational(3, 7), sympy.pi, sympy.sqrt(5)]
    for _ in range(60):
        tree = rng.choice(atoms)
        for _ in range(rng.randint(1, 5)):
            other = rng.choice(atoms)
            tree = rng.choice(
                [tree + other, tree - other, tree * other, tree / other, tree**2, sympy.sin(tree), sympy.exp(tree / 10)]
            )
        ours = value(parse(tidy(sympy.latex(tree))), {"x": 1.37})
        wanted = complex(tree.subs(x, 1.37).evalf())
        assert complex(ours) == pytest.approx(wanted, rel=1e-9), sympy.latex(tree)
        assert compare(parse(tidy(sympy.latex(tree))), parse(tidy(sympy.latex(sympy.expand(tree))))) == "same"
        assert compare(parse(tidy(sympy.latex(tree))), parse(tidy(sympy.latex(tree + x / 1000)))) == "different"


def test_white_space_does_not_count() -> None:
    rng = random.Random(4)
    for answer, reference in RIGHT + WRONG:
        spaced = f"{rng.choice(['', ' ', chr(10)])}{answer}{rng.choice(['', '  ', chr(10)])}"
        assert score("math", spaced, reference) == score("math", answer, reference), spaced
