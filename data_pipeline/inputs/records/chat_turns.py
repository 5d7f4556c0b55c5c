"""The turns of a conversation, in the order and form in which the formats of other tools give them.

messages, conversations, conversation, dialog       a list, also as a JSON string
Alpaca                 {"instruction", "input", "output", "history"}
ms-swift               {"query", "response", "history", "system"}; also prompt / response, prompt / completion
question and answer    {"question", "answer"}
OpenAI, batch          {"custom_id", "body": {"messages": [...]}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import BadSample

LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue")
# Fields with a question, and with its answer.
PAIRS = (
    ("instruction", "output"),
    ("query", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
_JSON_FIELDS = (*LISTS, "history", "images", "videos", "objects", "tools")


def parsed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its lists as such where it has them as JSON strings, and the body of a batch unpacked."""
    body = record.get("body")
    if isinstance(body, dict) and "messages" in body and "messages" not in record:
        rest = {key: value for key, value in body.items() if key != "messages"}
        record = {**record, "body": rest, "messages": body["messages"]}
    found = {field: _from_json(record.get(field)) for field in _JSON_FIELDS if isinstance(record.get(field), str)}
    lists = {field: value for field, value in found.items() if isinstance(value, list | dict)}
    return {**record, **lists} if lists else record


def list_name(record: dict[str, Any]) -> str | None:
    """Return the field with the list of turns, of a parsed record."""
    for name in LISTS:
        if name in record and (name in LISTS[:2] or _is_turns(record[name])):
            return name
    return None


def pair_names(record: dict[str, Any]) -> tuple[str, str] | None:
    """Return the fields with the question and the answer of a record without a list of turns."""
    pairs = PAIRS[:1] if "text" in record else PAIRS
    return next((pair for pair in pairs if all(record.get(name) is not None for name in pair)), None)


def turns(record: dict[str, Any]) -> tuple[list[Any], set[str]]:
    """Return the turns of a parsed record, the system turn first, and the fields that they come from.

    Raises:
        BadSample: bad_record or preference_pair.
    """
    system = record.get("system", record.get("system_prompt"))
    used = {"system", "system_prompt"} if isinstance(system, str) or system is None else set()
    first: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    name, pair = list_name(record), pair_names(record)
    if name is None and pair is not None:
        fields = {*pair, "history", *(["input"] if pair[0] == "instruction" else [])}
        return [*first, *_pair_turns(record, *pair)], used | fields
    given = record.get(name) if name else None
    if not isinstance(given, list) or not given:
        raise BadSample("bad_record", 'a conversation needs a non-empty list "messages" or "conversations"')
    return [*first, *given], used | {str(name)}


def count_messages(raw: Any) -> int:
    """Count the messages that a record gives, apart from converting it: items of its lists, questions and answers.

    Args:
        raw: The record, parsed or as JSON; anything else has no messages.
    """
    if isinstance(raw, bytes):
        raw = _from_json(raw)
    if not isinstance(raw, dict) or raw.get("domain", "chat") != "chat":
        return 0
    record = parsed(raw)
    name, pair = list_name(record), pair_names(record)
    if name is not None:
        count = len(record[name]) if isinstance(record[name], list) else 0
    elif pair is not None:
        history, prompt = record.get("history"), record[pair[0]]
        count = 2 * len(history) if isinstance(history, list) else 0
        count += sum(len(side) if isinstance(side, list) else 1 for side in (prompt, record[pair[1]]))
    elif isinstance(record.get("texts"), list):  # The Cauldron: pairs of a user and an assistant
        count = 2 * sum(isinstance(pair, dict) for pair in record["texts"])
    else:
        count = 2 * ("question" in record and "answer" in record)
    if not count:
        return 0
    system = record.get("system", record.get("system_prompt"))
    return count + (isinstance(system, str) and bool(system))


def _pair_turns(record: dict[str, Any], asked_name: str, answer_name: str) -> Iterator[Any]:
    asked, answer, history = record[asked_name], record[answer_name], record.get("history") or []
    if isinstance(asked, list) and isinstance(answer, list) and _is_turns(asked) and _is_turns(answer):
        yield from (*asked, *answer)  # TRL: prompt and completion as messages
        return
    if isinstance(answer, list):
        raise BadSample("preference_pair", f'"{answer_name}" is a list of answers to choose from')
    further = record.get("input") if asked_name == "instruction" else None
    parts = [part for part in (asked, further) if part not in (None, "")]
    if not all(isinstance(part, str) for part in parts):
        raise BadSample("bad_record", f'"{asked_name}" and "input" must be texts')
    pairs = [*history, ["\n".join(parts), answer]] if isinstance(history, list) else []
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadSample("bad_record", '"history" must be a list of [question, answer]')
    for asked_before, answer_before in pairs:
        yield {"role": "user", "content": asked_before}
        yield {"role": "assistant", "content": answer_before}


def _is_turns(value: Any) -> bool:
    entries = value if isinstance(value, list) else []
    return bool(entries) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in entries)


def _from_json(value: Any) -> Any:
    if value.lstrip()[:1] not in ("[", "{", b"[", b"{"):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
