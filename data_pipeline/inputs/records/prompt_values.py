"""Values of prompts as other tools write them: files, references, lists that are JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from data_pipeline.domains.rl_record import ANSWER_MARKS
from data_pipeline.errors import BadSample
from data_pipeline.inputs.records import chat_turns
from data_pipeline.inputs.records.record_fields import OPTIONS

_JSON_FIELDS = ("prompt", "reward_model", "extra_info", "options", "choices", "settings")


def file_of(entry: Any, notes: Counter[str]) -> Any:
    """Return a file of a prompt as paths and {"bytes", "path"} are written; verl has {"video": path, "fps": 2}, too."""
    if not isinstance(entry, dict):
        return entry
    if key := next((key for key in OPTIONS.values() if isinstance(entry.get(key), str)), ""):
        notes.update(f"part key {other}" for other in entry.keys() - {key} if entry[other] is not None)
        entry = entry[key]
    elif entry.get("path") and not entry.get("bytes"):
        entry = entry["path"]
    return entry.removeprefix("file://") if isinstance(entry, str) else entry


def single(value: Any) -> Any:
    """Return the entry of a list of one; any other value unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def parsed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its lists and objects as such where they are JSON."""
    record = chat_turns.parsed(record)
    found: dict[str, Any] = {}
    for name in _JSON_FIELDS:
        value = record.get(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                found[name] = json.loads(value)
            except (ValueError, RecursionError):  # a question may begin with a bracket
                continue
    return {**record, **{name: value for name, value in found.items() if isinstance(value, dict | list)}}


def reference_text(value: Any) -> str:
    """Return a reference as text.

    "<think>...</think><answer>It is <|begin_of_box|>7<|end_of_box|>.</answer>"  ->  "7"
    [[1, 2, 3, 4]]  ->  "[[1, 2, 3, 4]]"

    Raises:
        BadSample: bad_reference.
    """
    value = value if _is_numbers(value) else single(value)
    if isinstance(value, bool) or value is None:
        raise BadSample("bad_reference", f"its reference is {json.dumps(value)}: write a text")
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and not _is_numbers(value):
        raise BadSample("bad_reference", "its reference is a list of several: write the one answer that is right")
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    elif "</think>" in text:
        text = text.rpartition("</think>")[2]
    if text.count("<|begin_of_box|>") == 1:
        text = text.partition("<|begin_of_box|>")[2].partition("<|end_of_box|>")[0]
    return text.strip() if any(mark in str(value) for mark in ANSWER_MARKS) else text


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_set(value: Any) -> bool:
    """Return whether a value means yes; tables write an empty struct as fields of null."""
    return any(map(is_set, value.values())) if isinstance(value, dict) else bool(value)
