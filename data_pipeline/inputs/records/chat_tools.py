r"""Tools, calls and responses in the chats of other tools, in the form of the domain `chat`.

OpenAI           {"role": "assistant", "content": null, "tool_calls": [{"function": {"name", "arguments": "{...}"}}]},
                 {"role": "tool", "content": "..."}; older: "functions", "function_call", {"role": "function", ...}
LLaMA-Factory    {"from": "function_call", "value": "{\"name\": ..., \"arguments\": ...}"}, {"from": "observation", ...}
ms-swift         {"role": "tool_call", "content": "{...}"}, {"role": "tool_response", ...}; several in a row
Hermes           <tool_call>{...}</tool_call> in the text of an answer, <tool_response>...</tool_response> in a response

All become {"role": "assistant", ..., "tool_calls": [{"name": "zoom", "arguments": {...}}]} and {"role": "tool", ...}.
The tools of the record become a list of {"type": "function", "function": {...}}, as engines pass them to the template.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipeline.domains.tool_calls import read_calls, read_tools
from data_pipeline.errors import BadSample

TOOLS = ("tools", "functions")  # fields of a record
CALLS = ("tool_calls", "function_call")  # fields of a message
CALL_ROLES = ("function_call", "function-call", "tool_call")
RESPONSE_ROLES = ("tool", "function", "observation", "tool_response", "function_response")
JOINED = "message joined to the answer before it"  # counted as in its sample
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def tools_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a record as OpenAI writes them.

    Raises:
        BadSample: `bad_tools`.
    """
    given = [read_tools(record.get(name)) for name in TOOLS]
    if all(given):
        raise BadSample("bad_tools", f"the record has both {' and '.join(TOOLS)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in given[0] or given[1]]


def is_own_tools(record: dict[str, Any]) -> bool:
    """Return whether the tools of a record, if it has any, are written as `tools_of` returns them."""
    try:
        return tools_of(record) in ([], record.get("tools"))
    except BadSample:
        return False


def is_own_calls(turn: dict[str, Any]) -> bool:
    """Return whether the calls of a message, if it has any, are written as a `chat` record has them."""
    if "function_call" in turn:
        return False
    try:
        return "tool_calls" not in turn or written(read_calls(0, turn["tool_calls"])) == turn["tool_calls"] != []
    except BadSample:
        return False


def calls_of(number: int, turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the calls that a message has in fields of its own.

    Raises:
        BadSample: `bad_tool_call`.
    """
    return [call for name in CALLS for call in written(read_calls(number, turn.get(name)))]


def split_call(number: int, content: Any) -> tuple[str, list[dict[str, Any]]]:
    """Return the text and the calls of a message that is a call: JSON, perhaps after a thought.

    Raises:
        BadSample: `bad_tool_call`.
    """
    if isinstance(content, str):
        thought, closed, call = content.rpartition("</think>")
    else:
        thought, closed, call = "", "", content
    if isinstance(call, str) and _CALL.search(call):
        text, calls = _split_text(number, call)
        return thought + closed + text, calls
    calls = written(read_calls(number, call))
    if not calls:
        raise BadSample("bad_tool_call", f"message {number} is a tool call without a call")
    return thought + closed, calls


def convert_texts(messages: Sequence[dict[str, Any]]) -> None:
    """Read calls and responses that are written into texts as Hermes does it, in a chat that uses tools.

    Raises:
        BadSample: `bad_tool_call`.
    """
    for number, turn in enumerate(messages):
        if turn["role"] == "assistant" and "tool_calls" not in turn and _CALL.search(turn["content"]):
            turn["content"], turn["tool_calls"] = _split_text(number, turn["content"])
        elif turn["role"] == "tool" and (found := _RESPONSE.fullmatch(turn["content"])):
            turn["content"] = found[1]


def join_calls(messages: Iterable[dict[str, Any]], calls: set[int], notes: Counter[str]) -> list[dict[str, Any]]:
    """Join messages that are calls to the answers that they follow directly, in which the model writes them.

    Args:
        messages: The messages.
        calls: The numbers of those that are calls.
        notes: Counts the joined ones.

    Raises:
        BadSample: `unsupported_weight`, if only one of two joined messages is learned.
    """
    joined: list[dict[str, Any]] = []
    for number, turn in enumerate(messages):
        before = joined[-1] if joined else {"role": ""}
        if number not in calls or before["role"] != "assistant":
            joined.append(turn)
            continue
        if turn.get("loss") != before.get("loss"):
            raise BadSample("unsupported_weight", f"message {number} is a call of an answer with another weight")
        texts = {
            key: "\n".join(filter(None, (before.get(key), turn.get(key)))) for key in ("content", "reasoning_content")
        }
        joined[-1] = {
            **turn,
            **before,
            **{key: text for key, text in texts.items() if text or key == "content"},
            "tool_calls": [*before.get("tool_calls", []), *turn["tool_calls"]],
        }
        notes[JOINED] += 1
    return joined


def written(calls: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return calls as a `chat` record has them."""
    return [{"name": name, "arguments": arguments} for name, arguments in calls]


def _split_text(number: int, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and the calls that end it."""
    before, between = text[: text.index("<tool_call>")], _CALL.split(text)
    if any(part.strip() for part in between[2::2]):
        raise BadSample("bad_tool_call", f"message {number} has text after a call, or a call that is not JSON")
    calls = [call for part in between[1::2] for call in written(read_calls(number, [_json(number, part)]))]
    return before.rstrip(), calls


def _json(number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_tool_call", f"message {number} has a call that is not JSON: {error}") from error
