"""Files of answers: JSON lines, or one JSON array, of objects with the keys of `KEYS`.

{"id": "a", "verifier": "math", "response": "<think>..</think><|begin_of_box|>7<|end_of_box|>", "reference": "7"}
{"id": "b", "domain": "chart", "answer": "102", "reference": "100", "question": "How many units?"}
{"id": "c", "source": "geometry", "answer": "7", "reference": "7", "settings": {"tolerance": 0.01}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.nearest import suggestion
from rewards.registry import Registry, SourceConfig
from rewards.scoring import Task
from rewards.verdict import Item, RewardError

KEYS = {
    "id": "names the line in the output; without, its number",
    "verifier": "a name of rewards.table",
    "domain": "another word for `verifier`, and the group of the summary; DOMAINS has those that differ",
    "source": "a source of the registry, in place of `verifier`",
    "response": "what the model wrote",
    "answer": "in place of `response`: an answer that has been extracted",
    "reference": "what is right",
    "question": "what was asked",
    "settings": "of the verifier",
    "form": "of the response: glm45v, glm41v, either",
    "thinking": "false: the response need have no thought",
    "verifiable": "false: no answer is right or wrong, and a box is refused",
    "judge_says": "the reply of a judge that was recorded, used in place of one",
}
EXPECTATIONS = ("expected", "tolerance", "semantic", "stage", "why", "within_seconds")  # of files of cases
DOMAINS = {"format": "math", "safety": "math", "style": "math", "judge": "general"}  # domain -> verifier
MAX_LINE = 64 << 20  # bytes


@dataclass(frozen=True)
class Line:
    """One record of a file, as it was read: its place, and its content or what is wrong with it."""

    number: int  # from 1: a line, or an element of the array
    content: dict[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Record:
    """A record that was checked."""

    id: str
    domain: str  # group of the summary
    task: Task
    response: str | None
    answer: str | None  # where there is no response
    judge: str = ""  # of the registry
    judge_says: str | None = None
    expected: tuple[float | None, float, float | None] | None = None  # score, tolerance, score by a judge


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the records of a file. Lines that are no JSON object have an error.

    Raises:
        RewardError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            file.seek(0)
            if head.startswith(b"["):
                yield from _array(path, file.read())
            else:
                for number, text in enumerate(file, 1):
                    if text.strip():
                        yield _line(number, text)
    except OSError as error:
        raise RewardError(f"{path}: {error.strerror}") from error


def _array(path: Path, text: bytes) -> Iterator[Line]:
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{path} is no JSON: {error}") from error
    for number, record in enumerate(content, 1):
        yield _object(number, record)


def _line(number: int, text: bytes) -> Line:
    if len(text) > MAX_LINE:
        return Line(number, {}, f"it has {len(text)} bytes, more than {MAX_LINE}")
    try:
        return _object(number, json.loads(text.decode("utf-8-sig")))
    except UnicodeDecodeError:
        return Line(number, {}, "it is not in UTF-8")
    except (ValueError, RecursionError) as error:
        return Line(number, {}, f"it is no JSON: {error}")


def _object(number: int, record: Any) -> Line:
    if not isinstance(record, dict):
        return Line(number, {}, "it is no JSON object")
    return Line(number, record)


def record_of(line: Line, registry: Registry) -> Record:
    """Check a line.

    Raises:
        RewardError: A key is unknown or has a wrong type, or the verifier refuses reference or settings.
    """
    if line.error:
        raise RewardError(line.error)
    given = line.content
    for key in given:
        if key not in KEYS and key not in EXPECTATIONS:
            raise RewardError(f"unknown key {key!r}{suggestion(key, KEYS) or ': the keys are ' + ', '.join(KEYS)}")
    if ("response" in given) == ("answer" in given):
        raise RewardError("give either `response` or `answer`")
    source = _source(given, registry)
    settings = {} if given.get("settings") is None else given["settings"]
    if not isinstance(settings, dict):
        raise RewardError(f"settings is {settings!r}: give a mapping")
    task = source.task(Item(_text(given, "question"), _text(given, "reference"), settings))
    task.check()
    return Record(
        id=str(given.get("id", line.number)),
        domain=str(given.get("domain") or given.get("source") or source.verifier),
        task=task,
        response=_text(given, "response") if "response" in given else None,
        answer=_text(given, "answer") if "answer" in given else None,
        judge=source.judge,
        judge_says=_text(given, "judge_says") if given.get("judge_says") is not None else None,
        expected=_expected(given),
    )


def _source(given: dict[str, Any], registry: Registry) -> SourceConfig:
    """Return how a line is scored: as its source, changed by its own keys."""
    named = [key for key in ("source", "verifier", "domain") if given.get(key)]
    if not named:
        raise RewardError("give `verifier`, `domain`, or `source` with a registry")
    base = registry.source(_text(given, "source")) if "source" in named else SourceConfig()
    verifier = base.verifier
    if "source" not in named:
        name = _text(given, named[0])
        verifier = DOMAINS.get(name, name) if named[0] == "domain" else name
    return SourceConfig(
        verifier=verifier,
        settings=base.settings,
        form=_text(given, "form") or base.form,
        thinking=_flag(given, "thinking", base.thinking),
        verifiable=_flag(given, "verifiable", base.verifiable),
        judge=base.judge,
    )


def _text(given: dict[str, Any], key: str) -> str:
    value = given.get(key)
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RewardError(f"{key} is {str(value)[:80]!r}: give a text")
    return value


def _flag(given: dict[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise RewardError(f"{key} is {value!r}: give true or false")
    return value


def _expected(given: dict[str, Any]) -> tuple[float | None, float, float | None] | None:
    if "expected" not in given:
        if named := next((key for key in ("tolerance", "semantic") if key in given), ""):
            raise RewardError(
                f"{named} belongs to `expected`, which is missing: a verifier's tolerance stands in `settings`"
            )
        return None
    numbers = [given.get("expected"), given.get("tolerance", 0), given.get("semantic")]
    if any(not isinstance(number, int | float | None) for number in numbers):
        raise RewardError("expected, tolerance and semantic must be numbers or null")
    expected, tolerance, semantic = numbers
    return expected, max(float(tolerance or 0), 1e-9), semantic
