"""Source code by its structure: equal where Python, JSON and XML say so themselves, and nowhere else."""

from __future__ import annotations

import ast
import itertools
import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from rewards.source_code import MAX_CHARACTERS, tokens
from rewards.table import VERIFIERS
from rewards.verdict import Item, RewardError, Verdict

pytestmark = pytest.mark.fast
CODE = VERIFIERS["code"]
SOURCES = sorted((Path(__file__).parents[2] / "rewards").rglob("*.py"))


def score(answer: str, reference: str, **settings: Any) -> float:
    item = Item("", reference, settings)
    CODE.check(item)
    outcome = CODE.score(answer, item)
    assert isinstance(outcome, Verdict)
    return outcome.score


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_python_written_again_by_python_is_the_same(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert score(ast.unparse(ast.parse(code)), code) == 1


def test_python_is_the_same_where_pythons_trees_are() -> None:
    """Every statement of this project against its neighbour, and against a change of one word."""
    statements = [ast.unparse(node) for path in SOURCES for node in ast.parse(path.read_text()).body][:200]
    for a, b in itertools.pairwise(statements):
        same = ast.dump(ast.parse(a)) == ast.dump(ast.parse(b))
        assert (tokens(a, "python") == tokens(b, "python")) == same
    pairs = [
        ("x[0]", "x[1]"),
        ("f(*a)", "f(**a)"),
        ("{**a}", "{a: a}"),
        ("def f(a, *, b=1): pass", "def f(a, *, b): pass"),
        ("def f(*, a, b=1): pass", "def f(*, a=1, b): pass"),
        ("if a:\n b\nelse:\n c", "if a:\n b\n c"),
        ("1", "1.0"),
        ("1", "True"),
        ("'1'", "1"),
        ("b'a'", "'a'"),
        ("a = b = 1", "a = 1"),
        ("a.b.c", "a.b"),
        ("(a, b)", "[a, b]"),
        ("[[], []]", "[[[]]]"),
        ("((), (x,))", "(((),), x)"),
        ("not a", "a"),
        ("a - b", "b - a"),
        ("a < b", "a <= b"),
        ("lambda: 0", "lambda a: 0"),
    ]
    for a, b in pairs:
        assert 0 < score(a, b) < 1, (a, b)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("x=(1)", "x = 1  # one", 1),
        ("```python\nx = 1\n```", "x=1", 1),
        ("~~~\nx = 1\n~~~", "x=1", 1),
        ("x =", "x=1", 0),
        ("", "x=1", 0),
        ("print 1", "print(1)", 0),
        ("x = 2", "x = 1", 5 / 6),  # Module( Assign( Name Constant ) )
    ],
)
def test_python(answer: str, reference: str, expected: float) -> None:
    assert score(answer, reference) == pytest.approx(expected)


def random_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 6:
        return [None, True, False, rng.randrange(5), rng.choice("ab"), 0.5][kind]
    size = rng.randrange(3)
    if kind == 6:
        return [random_json(rng, depth + 1) for _ in range(size)]
    return {rng.choice("abc"): random_json(rng, depth + 1) for _ in range(size)}


def typed(value: Any) -> str:
    """Say the same of values that JSON has equal: true is not 1, and 1.0 is."""
    return json.dumps(value, sort_keys=True)


def test_json_is_the_same_where_its_values_are() -> None:
    rng = random.Random(0)
    values = [random_json(rng) for _ in range(300)]
    equal = 0
    for a in values:
        for b in rng.sample(values, 20):
            same = typed(a) == typed(b)
            assert (tokens(json.dumps(a, indent=3), "json") == tokens(json.dumps(b), "json")) == same, (a, b)
            equal += same
    assert equal > 100
    assert score('{"b": [1, 2], "a": 1.0}', '{"a":1,"b":[1,2]}', language="json") == 1
    assert score('{"b": [2, 1], "a": 1}', '{"a":1,"b":[1,2]}', language="json") == 3 / 4
    assert score("[true]", "[1]", language="json") == 1 / 2
    assert score("{'a': 1}", '{"a": 1}', language="json") == 0


def canonical(text: str) -> str:
    return ET.canonicalize(text, strip_text=True)


def test_xml_is_the_same_where_its_canonical_form_is() -> None:
    drawings = [
        '<svg><rect x="1" y="2"/></svg>',
        '<svg>\n <rect y="2" x="1"></rect>\n</svg>',
        '<svg><rect x="1" y="3"/></svg>',
        '<svg><g><rect x="1" y="2"/></g></svg>',
        '<svg><rect x="1"/><rect y="2"/></svg>',
        '<svg><rect y="2"/><rect x="1"/></svg>',
        "<svg><!-- c --><rect x='1' y='2'/></svg>",
        "<svg><text>a</text></svg>",
        "<svg><text>b</text></svg>",
        "<svg>a<text/></svg>",
        "<svg><text/>a</svg>",
        '<svg xmlns="http://www.w3.org/2000/svg"><rect x="1" y="2"/></svg>',
        "<svg><a/><a/></svg>",
        "<svg><a><a/></a></svg>",
    ]
    for a in drawings:
        for b in drawings:
            assert (score(a, b, language="svg") == 1) == (canonical(a) == canonical(b)), (a, b)
    for broken in (
        "<svg><rect></svg>",
        "<svg",
        "",
        "a",
        '<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>',
        "<svg x=1/>",
        "<svg/><svg/>",
    ):
        assert score(broken, drawings[0], language="svg") == 0


def test_html_is_what_a_browser_makes_of_it() -> None:
    page = "<html><body><p class='a'>One<br>two</p><ul><li>x<li>y</ul></body></html>"
    same = "<!DOCTYPE html>\n<p class=a>One<br/>two\n<ul><li>x</li> <li>y</li></ul>"
    assert score(same, page, language="html") == 1
    assert 0.5 < score(same.replace("One", "Two"), page, language="html") < 1
    assert score("", page, language="html") == 0


def test_text_and_partial() -> None:
    assert score("a+b ;", "a + b;", language="text") == 1
    assert score("a + c;", "a + b;", language="text") == 3 / 4
    assert score("a + c;", "a + b;", language="text", partial=False) == 0
    assert score("a +b;", "a + b;", language="text", partial=False) == 1


@pytest.mark.parametrize(
    ("reference", "settings", "words"),
    [
        ("x=1", {"language": "pyton"}, "did you mean python"),
        ("x=", {}, "is no python"),
        ("{'a'}", {"language": "json"}, "is no json"),
        ("", {"language": "text"}, "is empty"),
        ("x" * (MAX_CHARACTERS + 1), {}, "more than"),
        ("x=1", {"partial": 1}, "type bool"),
    ],
)
def test_wrong_items_are_refused(reference: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RewardError, match=words):
        score("", reference, **settings)


def test_nothing_is_run(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    code = f"open({str(path)!r}, 'w').write('x')\nraise SystemExit"
    assert score(code, code) == 1
    assert not path.exists()
