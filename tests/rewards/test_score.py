"""`python -m rewards.score`, its records and registries, run as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewards.registry import parse_registry, read_registry
from rewards.scoring import Task, score_response
from rewards.table import VERIFIERS, verifier_named
from rewards.verdict import Ask, Item, RewardError, Verdict

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "cases.json"
BOX = "<think>.</think><|begin_of_box|>{}<|end_of_box|>"

REGISTRY = """
sources:
  geometry: {verifier: math, form: glm45v, settings: {tolerance: 0.01}}
  quick: {verifier: math, form: glm45v, thinking: false}
  chats: {verifiable: false, form: glm45v}
judges:
  small: {url: "http://localhost:1/v1", model: m, samples: 3}
"""


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rewards.score", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def scored(path: Path, *records: Any, arguments: tuple[Any, ...] = ()) -> tuple[list[dict[str, Any]], str, int]:
    """Score records and return the lines of output, what the command said, and its exit status."""
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    done = run(path, *arguments)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr, done.returncode


def test_open_cases_are_scored_as_they_expect(tmp_path: Path) -> None:
    known = {*VERIFIERS, "format", "safety", "style"} | ({"judge"} if "general" in VERIFIERS else set())
    cases = [case for case in json.loads(CASES.read_text(encoding="utf-8")) if case["domain"] in known]
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = run(tmp_path / "cases.json", "--out", tmp_path / "scores.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [case["id"] for case in cases]
    for row, case in zip(rows, cases, strict=True):
        if case["expected"] is None:
            assert (row["rules"], row["score"]) == (None, case["semantic"]), case
        else:
            assert row["score"] == pytest.approx(case["expected"], abs=case["tolerance"] or 1e-9), case
    assert f"{len(cases)}/{len(cases)}" in done.stderr


def test_judge_that_is_needed_and_missing_gives_no_score(tmp_path: Path) -> None:
    line = {"id": "a", "verifier": "math", "answer": "falling", "reference": "rising"}
    rows, said, status = scored(tmp_path / "a.jsonl", line, {**line, "judge_says": "1.0"})
    assert [(row["score"], row["rules"]) for row in rows] == [(None, None), (1.0, None)]
    assert rows[0]["reason"] == "judge needed"
    assert "judge needed 1" in said
    assert status == 0


def test_lines_that_cannot_be_scored_are_named_and_the_others_are_scored(tmp_path: Path) -> None:
    good = {"id": "good", "verifier": "math", "answer": "7", "reference": "7"}
    bad: list[tuple[Any, str]] = [
        ("{not json\n", "it is no JSON"),
        ("[1]\n", "it is no JSON object"),
        ({**good, "anwser": "7"}, "unknown key 'anwser': did you mean answer?"),
        ({**good, "response": "7"}, "give either `response` or `answer`"),
        ({**good, "verifier": "maths"}, "there is no verifier 'maths': did you mean math?"),
        ({"answer": "7", "reference": "7"}, "give `verifier`, `domain`, or `source`"),
        ({**good, "reference": None}, "math: the reference is empty"),
        ({**good, "settings": {"tolerence": 1}}, "did you mean tolerance?"),
        ({**good, "settings": [1]}, "settings is [1]: give a mapping"),
        ({**good, "settings": False}, "settings is False: give a mapping"),
        ({**good, "form": "glm4"}, "there is no form 'glm4'"),
        ({**good, "source": "geometry"}, "the registry has no source 'geometry'"),
        ({**good, "answer": ["7"]}, "give a text"),
        ({**good, "thinking": "no"}, "thinking is 'no': give true or false"),
        ({**good, "settings": {"tolerance": float("nan")}}, "tolerance is nan: give 0 or a positive number"),
        ({**good, "settings": {"tolerance": -1}}, "tolerance is -1: give 0 or a positive number"),
        ({**good, "tolerance": 0.1}, "tolerance belongs to `expected`, which is missing"),
        ({**good, "verifier": "counting", "reference": "x"}, "no whole number"),
    ]
    rows, said, status = scored(tmp_path / "a.jsonl", good, *(record for record, _ in bad), good)
    assert [row["score"] for row in rows] == [1.0, *[None] * len(bad), 1.0]
    for number, (row, (_, message)) in enumerate(zip(rows[1:-1], bad, strict=True), 2):
        assert message in row["error"]
        assert f"line {number}: {row['error']}" in said
    assert "Traceback" not in said
    assert status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "absent.jsonl: No such file"),
        ([CASES, "--judge", "localhost", "--judge-model", "m"], "--judge is 'localhost'"),
        ([CASES, "--judge", "http://localhost:1/v1"], "--judge-model is missing"),
        ([CASES, "--registry", "absent.yaml"], "absent.yaml: No such file"),
        ([CASES, "--out", "/absent/scores.jsonl"], "/absent/scores.jsonl"),
        ([CASES, "--out", CASES], "is the file of the answers, which would be replaced"),
        ([CASES, "--out", CASES.parent], "is a folder: name a file"),
        ([CASES, "--judge-cache", "replies"], "--judge-cache is of --judge, which is missing"),
    ],
)
def test_mistake_in_the_call_is_one_line(arguments: list[Any], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_registry_says_how_a_source_is_scored(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(REGISTRY)
    lines = [
        {"source": "geometry", "response": BOX.format("1.005"), "reference": "1"},
        {"source": "geometry", "response": BOX.format("1.005"), "reference": "1", "settings": {"tolerance": 1e-3}},
        {"source": "geometry", "response": "<|begin_of_box|>1<|end_of_box|>", "reference": "1"},
        {"source": "quick", "response": "<|begin_of_box|>1<|end_of_box|>", "reference": "1"},
        {"source": "chats", "response": BOX.format("spring"), "reference": None},
        {"source": "chats", "response": "<think>.</think>A poem.", "judge_says": "1.0"},
    ]
    rows, said, status = scored(tmp_path / "a.jsonl", *lines, arguments=("--registry", tmp_path / "r.yaml"))
    assert [(row["score"], row["reason"]) for row in rows] == [
        (1.0, "number"),
        (0.0, "different"),
        (0.0, "bad_form"),
        (1.0, "equal"),
        (0.0, "boxed"),
        (1.0, "judge"),
    ], said
    assert status == 0


def test_surrogates_and_control_characters_come_through(tmp_path: Path) -> None:
    rows, _, status = scored(
        tmp_path / "a.jsonl",
        '{"id": "a", "verifier": "math", "answer": "\\ud800", "reference": "7"}\n',
        {"id": "b", "verifier": "math", "answer": "7\0", "reference": "7"},
    )
    assert [row["score"] for row in rows] == [0.0, 0.0]
    assert rows[0]["answer"] == "\ud800"
    assert status == 0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a registry must be a mapping"),
        ({}, "it has neither sources nor judges"),
        ({"sources": {"a": {"verifier": "math", "settings": {"tolerance": -1.0}}}}, "the setting tolerance is -1.0"),
        ({"sources": {"a": {"verifier": "grounding", "settings": {"iou": 7}}}}, "iou is 7, not from 0 to below 1"),
        ({"sources": {"a": {"verifier": "chart", "settings": {"tolerance": 2.5}}}}, "tolerance is 2.5, not from 0 to"),
        ({"sources": {"a": {"verifier": "video", "settings": {"interval": "x"}}}}, "the setting interval is 'x'"),
        ({"sources": {"a": {"verifier": "code", "settings": {"language": "pyton"}}}}, "did you mean python?"),
        ({"sources": {"a": {"verifier": "physics", "settings": {"options": 5}}}}, "options: 5 is neither a list nor"),
        ({"sources": {"a": {"verifier": "vqa", "settings": {"options": 5}}}}, "options: 5 is neither a list nor"),
        ({"source": {}}, "no key 'source': did you mean sources?"),
        ({"sources": {"a": {"verifer": "math"}}}, "sources.a has no key 'verifer': did you mean verifier?"),
        ({"sources": {"a": {}}}, "sources.a: verifier is missing"),
        ({"sources": {"a": {"verifier": "mth"}}}, "sources.a: there is no verifier 'mth': did you mean math?"),
        ({"sources": {"a": {"verifier": "math", "settings": {"x": 1}}}}, "sources.a: math has no setting 'x'"),
        ({"sources": {"a": {"verifier": "math", "form": "glm46"}}}, "sources.a: there is no form 'glm46'"),
        ({"sources": {"a": {"verifier": "math", "thinking": 1}}}, "thinking is 1, not of type bool"),
        ({"sources": {"a": {"verifier": "math", "judge": "big"}}}, "sources.a: there is no judge 'big'"),
        ({"judges": {"a": {"url": "x", "model": "m"}}}, "judges.a: judge.url is 'x'"),
        ({"judges": {"a": {"modle": "m"}}}, "judges.a has no key 'modle': did you mean model?"),
    ],
)
def test_mistake_in_a_registry_is_named(content: Any, message: str) -> None:
    with pytest.raises(RewardError) as error:
        parse_registry(content)
    assert message in str(error.value)


@pytest.mark.fast
def test_registry_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: [")
    with pytest.raises(RewardError, match=r"r\.yaml cannot be read as YAML"):
        read_registry(path)


@pytest.mark.fast
def test_style_overrules_a_right_answer() -> None:
    task = Task(verifier_named("math"), Item("", "7"), "glm45v")
    loop = "I look at the image once more and count the dots. " * 12
    assert score_response(f"<think>{loop}</think><|begin_of_box|>7<|end_of_box|>", task).outcome == Verdict(
        0.0, "repetition"
    )
    assert score_response(BOX.format("7"), task) == (Verdict(1.0, "equal"), "7")
    assert score_response(BOX.format("8"), task) == (Verdict(0.0, "different"), "8")
    assert score_response("7", task) == (Verdict(0.0, "bad_form"), None)


@pytest.mark.fast
def test_what_is_not_verifiable_is_for_a_judge() -> None:
    task = Task(verifier_named("math"), Item(), "glm45v", verifiable=False)
    task.check()
    assert score_response("<think>.</think>A poem.", task) == (Ask("not_verifiable"), "A poem.")
    assert score_response(BOX.format("spring"), task).outcome == Verdict(0.0, "boxed")
