"""Conversations in the formats of other tools, converted to records of the domain `chat`.

    ShareGPT, LLaVA      {"conversations": [{"from": "human", "value": "<image>What is it?"},
                                            {"from": "gpt", "value": "A cat."}], "image": "cat.jpg"}
    LLaMA-Factory        {"messages": [{"role": "user", "content": "<image>What is it?"}, ...], "images": ["cat.jpg"]}
    Alpaca               {"instruction": "What is it?", "input": "", "output": "A cat.", "history": [["Hi", "Hello"]]}
    OpenAI               {"messages": [{"role": "user", "content": [
                              {"type": "image_url", "image_url": {"url": "cat.jpg"}},
                              {"type": "text", "text": "What is it?"}]}, ...]}

All four become

    {"domain": "chat", "messages": [{"role": "user", "content": "<image>What is it?"},
                                    {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

with `reasoning_content` and `thinking` where they are given, and all other fields of the record. Images and videos
stay paths or data: URIs. Conversations with tool calls are rejected: the `chat` domain has no turn for their results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.flow import escape_placeholders
from data_pipeline.inputs.references import is_data_uri
from data_pipeline.sample import ROLE_TOKENS

_ROLE_NAMES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "function_call", "function-call", "observation", "tool_call"),
}
_ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
# Field of a `chat` record -> its placeholder, and the names under which a record may list its files.
_MEDIA = {"images": ("<image>", ("images", "image")), "videos": ("<video>", ("videos", "video"))}
# "type" of a part of a message's content -> the field that its file goes to.
_PARTS = {
    "image_url": "images",
    "image": "images",
    "input_image": "images",
    "video_url": "videos",
    "video": "videos",
    "input_video": "videos",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_AUDIO = ("audio", "audios")
# Fields that the conversion uses up. All others are kept in the record.
_CONSUMED = {
    "domain",
    "messages",
    "conversations",
    "system",
    "tools",
    "functions",
    "instruction",
    "input",
    "output",
    "history",
    "thinking",
    "enable_thinking",
    "images",
    "image",
    "videos",
    "video",
    "audio",
    "audios",
}


def is_foreign_chat(record: dict[str, Any]) -> bool:
    """Return whether a record is a conversation that `normalise` must convert."""
    if "domain" in record and record["domain"] != "chat":
        return False
    if "conversations" in record or ("instruction" in record and "output" in record):
        return True
    messages = record.get("messages")
    return isinstance(messages, list) and ("domain" not in record or not all(map(_is_plain_turn, messages)))


def normalise(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a conversation in any of the formats above to a record of the domain `chat`.

    "images" and "videos" become lists of paths or data: URIs, one per <image> and <video> in the messages, in order.
    If a record has images but no placeholder at all, the placeholders go before the text of the first user turn.

    Raises:
        BadSample: bad_record, unknown_role, unsupported_tool_call, unsupported_audio, unsupported_content,
            unsupported_weight, preference_pair, remote_file or media_mismatch.
    """
    _check_supported(record)
    found: dict[str, list[str | None]] = {field: [] for field in _MEDIA}
    messages = [_message(number, turn, found) for number, turn in enumerate(_turns(record))]
    messages = [turn for turn in messages if turn["content"] or turn["role"] != "system"]
    normalised: dict[str, Any] = {"domain": "chat", "messages": messages}
    thinking = record.get("thinking", record.get("enable_thinking"))
    if isinstance(thinking, bool):
        normalised["thinking"] = thinking
    for field, (placeholder, names) in _MEDIA.items():
        listed = [_reference(entry) for name in names for entry in _as_list(record.get(name))]
        files = _choose_files(field, listed, found[field])
        if files and not any(placeholder in turn["content"] for turn in messages):
            first = next((turn for turn in messages if turn["role"] == "user"), None)
            if first is None:
                raise BadSample("media_mismatch", f"{len(files)} {field}, but no user turn to put them in")
            first["content"] = placeholder * len(files) + first["content"]
        written = sum(turn["content"].count(placeholder) for turn in messages)
        if written != len(files):
            raise BadSample("media_mismatch", f"{written} {placeholder} in the text but {len(files)} {field}")
        if files:
            normalised[field] = files
    return {**normalised, **{key: value for key, value in record.items() if key not in _CONSUMED}}


def normalise_nameless(
    record: dict[str, Any], media: dict[str, list[Media]]
) -> tuple[dict[str, Any], dict[str, list[Media]]]:
    """Convert a conversation whose files are in memory and have no names.

    Args:
        record: The conversation.
        media: Its files, by "images" and "videos".

    Returns:
        The record of the domain `chat`, and the files in the order of their placeholders.

    Raises:
        BadSample: As `normalise`.
    """
    numbers = {field: [str(number) for number in range(len(files))] for field, files in media.items()}
    record = normalise({**record, **numbers})
    return record, {field: [files[int(number)] for number in record.pop(field, [])] for field, files in media.items()}


def _check_supported(record: dict[str, Any]) -> None:
    if any(not _is_empty(record.get(key)) for key in ("tools", "functions")):
        raise BadSample("unsupported_tool_call", "the record gives the assistant tools to call")
    if any(not _is_empty(record.get(key)) for key in _AUDIO):
        raise BadSample("unsupported_audio", "the record contains audio, which the model does not support")
    if "chosen" in record and "rejected" in record:
        raise BadSample("preference_pair", "a pair of answers to choose from is not a conversation to learn")


def _is_plain_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in ROLE_TOKENS and isinstance(turn.get("content"), str)


def _turns(record: dict[str, Any]) -> list[Any]:
    """Return the turns in their given form and order, the system turn first."""
    system = record.get("system")
    turns: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    if "instruction" in record and "messages" not in record and "conversations" not in record:
        return [*turns, *_alpaca_turns(record)]
    given = record.get("messages", record.get("conversations"))
    if not isinstance(given, list) or not given:
        raise BadSample("bad_record", 'a conversation needs a non-empty list "messages" or "conversations"')
    return [*turns, *given]


def _alpaca_turns(record: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if isinstance(record.get("output"), list):
        raise BadSample("preference_pair", '"output" is a list of answers to choose from')
    history = record.get("history") or []
    asked = [part for part in (record["instruction"], record.get("input")) if part]
    if not all(isinstance(part, str) for part in asked):
        raise BadSample("bad_record", '"instruction" and "input" must be texts')
    question = "\n".join(asked)
    pairs = [*history, [question, record.get("output")]] if isinstance(history, list) else []
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadSample("bad_record", '"history" must be a list of [question, answer]')
    for asked_before, answer in pairs:
        yield {"role": "user", "content": asked_before}
        yield {"role": "assistant", "content": answer}


def _message(number: int, turn: Any, found: dict[str, list[str | None]]) -> dict[str, str]:
    """Return one turn as a message of a `chat` record.

    Appends the files that its parts name to `found`, None for a part that names no file.
    """
    if not isinstance(turn, dict):
        raise BadSample("bad_record", f"message {number} is not a JSON object")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadSample("unknown_role", f"message {number}: the role {name!r} is none of {', '.join(_ROLES)}")
    if role == "tool" or not _is_empty(turn.get("tool_calls")) or not _is_empty(turn.get("function_call")):
        raise BadSample("unsupported_tool_call", f"message {number} is a tool call or its result")
    if turn.get("weight") == 0:
        raise BadSample("unsupported_weight", f"message {number} has weight 0, but every answer would be learned")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(number, part, found) for part in content)
    if not isinstance(content, str):
        raise BadSample("bad_record", f"message {number} ({name}): its content is neither a text nor a list of parts")
    message = {"role": role, "content": content}
    reasoning = next((turn[key] for key in _REASONING if turn.get(key)), None)
    if role == "assistant" and isinstance(reasoning, str):
        message["reasoning_content"] = reasoning
    return message


def _part(number: int, part: Any, found: dict[str, list[str | None]]) -> str:
    """Return a part of a message's content as text; a file that it names goes to `found`."""
    if isinstance(part, str):
        return escape_placeholders(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return escape_placeholders(part["text"])
    if kind not in _PARTS:
        raise BadSample("unsupported_content", f"message {number} has a part of type {kind!r}")
    field = _PARTS[kind]
    value = next((part[key] for key in (kind, "image_url", "image", "video", "url", "path") if part.get(key)), None)
    found[field].append(None if value is None else _reference(value))
    return _MEDIA[field][0]


def _reference(value: Any) -> str:
    """Return a path or data: URI that is given as such, as a file: URL or as {"url": ...}."""
    if isinstance(value, dict):
        value = value.get("url") or value.get("path")
    if not isinstance(value, str) or not value:
        raise BadSample("bad_record", "an image or video must be given as a path or a data: URI")
    if is_data_uri(value):
        return value
    if value[:7].lower() == "file://":
        return unquote(urlsplit(value).path)
    if "://" in value[:16]:
        raise BadSample("remote_file", f"{value[:200]}: nothing is downloaded; save it beside the records")
    return value


def _choose_files(field: str, listed: list[str], found: list[str | None]) -> list[str]:
    """Return the files in the order of their placeholders.

    These are the files that the parts of messages name or, if they name none, those that the record lists.
    """
    named = [reference for reference in found if reference is not None]
    if not named:
        return listed
    if len(named) < len(found) or (listed and listed != named):
        raise BadSample("media_mismatch", f'{field} are named both in the messages and in the record\'s "{field}"')
    return named


def _is_empty(value: Any) -> bool:
    """Return whether a value means "nothing", as data sets write it: null, [], "" or "[]"."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return not value


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]
