"""A thousand hostile answers per verifier of mathematics and the sciences: nothing runs, hangs or raises."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import workers
from rewards.table import verifier_named
from rewards.verdict import Ask, Item, Verdict
from tests.rewards.test_hostile import hostile

REFERENCES = {"math": "3", "physics": "12 m", "chemistry": "H2SO4", "chart": "3", "counting": "3"}
RUNS = [
    "__import__('os').system('touch RAN')",
    "().__class__.__bases__[0].__subclasses__()",
    "exec(\"open('RAN','w')\")",
    "eval(compile('open(\"RAN\",\"w\")','','exec'))",
    "lambda: open('RAN','w')",
    "{0.__class__.__init__.__globals__}",
    "{open('RAN','w')}",
    "%(a)s %n %s",
    "\\input{/etc/passwd}",
    "\\write18{touch RAN}",
    "\\immediate\\write18{touch RAN}",
    "$(touch RAN)",
    "`touch RAN`",
    "; touch RAN #",
    "Symbol('x').__class__",
    'S(\'__import__("os").system("touch RAN")\')',
    "\\sympy{__import__('os').system('touch RAN')}",
]
DEEP = ["√" * 990 + "2", "sin " * 240 + "x", "x" + "!" * 990, "1+" * 490 + "1", "2" + "^2" * 490, "\\frac1" * 160 + "2"]
HANGS = [
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "(9^9)^{(9^9)^9}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\binom{1000000000}{500000000}",
    "1000000!",
    "((10!)!)!",
    "10!!!!!!!!",
    "\\sum_{k=1}^{10^9} \\sin(k)",
    "\\sum_{k=1}^{999999} \\frac{1}{k}",
    "\\sum_{k=1}^{\\infty} \\frac{\\sin k}{k^7}",
    "\\prod_{k=1}^{10^9} k",
    "\\prod_{k=1}^{99999} (x+k)",
    "\\int_0^1 \\int_0^1 \\int_0^1 e^{xyz} \\sin(x^y) dx dy dz",
    "\\int \\frac{\\sin(\\sin(\\sin x))}{x^x} dx",
    "\\lim_{x \\to 0} (\\sin x)^{(\\tan x)^{x}}",
    "(x+y+z+w)^{1000}",
    "\\left(x+\\frac{1}{x}\\right)^{99999}",
    "\\sqrt[10^9]{2^{10^9}}",
    "\\sin(10^{10^{10}})",
    "\\log(\\log(9^{9^{9}}))",
    "1" + "0" * 4000,
    "\\frac{1}{" * 40 + "2" + "}" * 40,
    "\\frac{" * 4000,
    "\\sqrt{" * 60 + "2" + "}" * 60,
    "(" * 4000 + "3" + ")" * 4000,
    "-" * 4000 + "3",
    "3" + "!" * 4000,
    "x" * 4000,
    "x=" * 2000 + "3",
    "1," * 2400 + "3",
    "{" + "1," * 400 + "3}",
    "±" * 3000 + "3",
    "1±" * 900 + "3",
    "(1,2)∪" * 700 + "(3,4)",
    "x<" * 2000 + "3",
    "|" * 4000 + "3",
    "1 or " * 900 + "3",
    "\\begin{pmatrix}" + "1&" * 200 + "1\\end{pmatrix}",
    "\\begin{pmatrix}a&b\\\\c&d\\end{pmatrix}^{100000}",
    "3 " + "m/s" * 1500,
    "3 m^99999999999",
    "3 (((((((((m",
    "H" * 4000,
    "(H" * 300 + ")9999" * 300,
    "H9999999999999999999",
    "H2SO4 + " * 500 + "→ H2",
    "a=b" * 1000,
    "a^{a^{a^{a}}}=b^{b^{b}}",
    "F=" + "m*a*" * 200 + "1",
    "sin" * 1600,
    *DEEP,
    "\\sin" * 1200 + "x",
    "1/" * 2400 + "3",
    "1 1/" * 1200 + "3",
    "3e" + "9" * 4000,
    "0." + "0" * 4000 + "3",
]


def answers(name: str) -> Iterator[str]:
    """Yield a thousand answers: what runs, what hangs, both spliced, and those that every verifier is tried with."""
    yield from RUNS
    yield from HANGS
    rng = random.Random(name)
    numbers = ["9", "10^9", "x", "\\pi", "1000000", "0", "-1", "\\infty", "10^{100}", "i", "0.1"]
    while True:
        kind = rng.randrange(4)
        if kind == 0:
            first, second = rng.choice(HANGS + RUNS), rng.choice(HANGS + RUNS)
            yield (
                first[: rng.randrange(1, 60)] + rng.choice(["+", "", "=", ",", "\\cdot ", "^", "_", "{"]) + second[:60]
            )
        elif kind == 1:
            tree = rng.choice(numbers)
            for _ in range(rng.randint(1, 6)):
                form = rng.choice(["{%s}^{%s}", "\\binom{%s}{%s}", "\\frac{%s}{%s}", "\\log_{%s}{%s}", "(%s)-(%s)"])
                tree = form % ((tree, rng.choice(numbers)) if rng.random() < 0.5 else (rng.choice(numbers), tree))
            yield tree
        elif kind == 2:
            form = rng.choice(["\\sum_{k=1}^{%s} k^{%s}", "\\prod_{k=1}^{%s} (k+%s)", "\\int_{0}^{%s} x^{%s} dx"])
            yield form % (rng.choice(numbers), rng.choice(numbers))
        else:
            yield "".join(rng.choices("0123456789+-*/^!(){}[]|,=<>xyπ√∞±°%\\ ", k=rng.randrange(1, 40)))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_a_thousand_hostile_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workers.configure(1, None if name == "math" else workers.Limits(seconds=0.5))  # the others take the same way
    verifier, item = verifier_named(name), Item("", REFERENCES[name])
    verifier.check(item)
    verifier.score("\\int_0^1 x dx", item)  # a server has started
    ours = answers(name)
    tried = [*hostile(name, 400), *(next(ours) for _ in range(600))]
    assert len(tried) == 1000
    worst, reasons = 0.0, dict[str, int]()
    for answer in tried:
        begun = time.monotonic()
        outcome = verifier.score(answer, item)
        seconds = time.monotonic() - begun
        worst = max(worst, seconds)
        assert seconds < 5, (answer[:60], len(answer), outcome)
        assert isinstance(outcome, Verdict | Ask)
        reasons[outcome.reason] = reasons.get(outcome.reason, 0) + 1
    print(name, f"worst {worst:.2f} s", reasons)
    assert not list(tmp_path.iterdir())  # no file RAN


@pytest.mark.fast
@pytest.mark.parametrize("name", REFERENCES)
def test_deep_answers_do_not_fill_the_stack(name: str) -> None:
    for answer in DEEP:
        outcome = verifier_named(name).score(answer, Item("", REFERENCES[name]))
        assert isinstance(outcome, Ask) or outcome.score == 0


@pytest.mark.fast
@pytest.mark.parametrize("name", REFERENCES)
def test_no_random_text_raises(name: str) -> None:
    rng = random.Random(name)
    verifier, item = verifier_named(name), Item("", REFERENCES[name])
    ranges = [(0, 0x80), (0, 0x3000), (0x4E00, 0x9FFF), (0x1D400, 0x1D7FF), (0xD800, 0xDFFF), (0, 0x10FFFF)]
    for _ in range(400):
        low, high = rng.choice(ranges)
        answer = "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(0, 30)))
        outcome = verifier.score(answer.replace("\\", "/"), item)
        assert isinstance(outcome, Verdict | Ask)
        assert verifier.score(f" {answer}\n".replace("\\", "/"), item) == outcome  # white space does not count
