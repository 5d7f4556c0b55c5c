"""Conversations in the formats that others write, as records of the domain `chat`.

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

with `reasoning_content` and `thinking` where they are given, and whatever else the record held. Pictures and clips stay
paths or data: URIs. Calls of tools are set aside: the published chat form has no turn for their answers here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.flow import literal
from data_pipeline.inputs.references import is_data_uri
from data_pipeline.sample import ROLE_TOKENS

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "function_call", "function-call", "observation", "tool_call"), "tool"),
}
_MEDIA = {"images": ("<image>", ("images", "image")), "videos": ("<video>", ("videos", "video"))}
# The parts of a message's content, by "type": which list they go to and where they name the file.
_PARTS = {
    **dict.fromkeys(("image_url", "image", "input_image"), "images"),
    **dict.fromkeys(("video_url", "video", "input_video"), "videos"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CONSUMED = {
    *("domain", "messages", "conversations", "system", "tools", "functions", "instruction", "input", "output"),
    *("history", "thinking", "enable_thinking", *(name for _, names in _MEDIA.values() for name in names)),
}
_AUDIO = ("audio", "audios")


def is_foreign_chat(record: dict[str, Any]) -> bool:
    """Whether a record is a conversation that `normalise` must bring into our form first."""
    if "domain" in record and record["domain"] != "chat":
        return False
    if "conversations" in record or ("instruction" in record and "output" in record):
        return True
    messages = record.get("messages")
    return isinstance(messages, list) and ("domain" not in record or not all(map(_is_ours, messages)))


def normalise(record: dict[str, Any]) -> dict[str, Any]:
    """A conversation in any of the formats above -> a record of the domain `chat`.

    "images" and "videos" are lists of paths or data: URIs, one for every <image> and <video> in the messages, in
    order. Where a record has pictures but no placeholder at all, they are put before the first user's words.

    Raises BadSample: bad_record, unknown_role, unsupported_tool_call, unsupported_audio, unsupported_content,
    unsupported_weight, preference_pair, remote_file, media_mismatch.
    """
    if any(not _is_empty(record.get(key)) for key in ("tools", "functions")):
        raise BadSample("unsupported_tool_call", "the record gives the assistant tools to call")
    if any(not _is_empty(record.get(key)) for key in _AUDIO):
        raise BadSample("unsupported_audio", "the record has sounds, which the model cannot hear")
    if "chosen" in record and "rejected" in record:
        raise BadSample("preference_pair", "a pair of answers to choose from is no conversation to imitate")

    found: dict[str, list[str | None]] = {field: [] for field in _MEDIA}
    messages = [_message(number, turn, found) for number, turn in enumerate(_turns(record))]
    messages = [turn for turn in messages if turn["content"] or turn["role"] != "system"]
    normalised: dict[str, Any] = {"domain": "chat", "messages": messages}
    thinking = record.get("thinking", record.get("enable_thinking"))
    if isinstance(thinking, bool):
        normalised["thinking"] = thinking
    for field, (placeholder, names) in _MEDIA.items():
        listed = [_reference(entry) for name in names for entry in _as_list(record.get(name))]
        files = _matched(field, listed, found[field])
        if files and not any(placeholder in turn["content"] for turn in messages):
            first = next((turn for turn in messages if turn["role"] == "user"), None)
            if first is None:
                raise BadSample("media_mismatch", f"{len(files)} {field}, but no user's turn to put them into")
            first["content"] = placeholder * len(files) + first["content"]
        written = sum(turn["content"].count(placeholder) for turn in messages)
        if written != len(files):
            raise BadSample("media_mismatch", f"{written} {placeholder} in the text but {len(files)} {field}")
        if files:
            normalised[field] = files
    return {**normalised, **{key: value for key, value in record.items() if key not in _CONSUMED | set(_AUDIO)}}


def normalise_nameless(
    record: dict[str, Any], media: dict[str, list[Media]]
) -> tuple[dict[str, Any], dict[str, list[Media]]]:
    """The same where the pictures and clips are at hand and have no names -> (the record, its files in the order of
    their placeholders). media: by "images" and "videos"."""
    numbers = {field: [str(number) for number in range(len(files))] for field, files in media.items()}
    record = normalise({**record, **numbers})
    return record, {field: [files[int(place)] for place in record.pop(field, [])] for field, files in media.items()}


def _is_ours(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in ROLE_TOKENS and isinstance(turn.get("content"), str)


def _turns(record: dict[str, Any]) -> list[Any]:
    """The turns in order, the system's words first, in whatever form they have."""
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
        raise BadSample("preference_pair", '"output" lists answers to choose from')
    history = record.get("history") or []
    asked = [part for part in (record["instruction"], record.get("input")) if part]
    if not all(isinstance(part, str) for part in asked):
        raise BadSample("bad_record", '"instruction" and "input" must be texts')
    question = "\n".join(asked)
    pairs = [*history, [question, record.get("output")]] if isinstance(history, list) else []
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadSample("bad_record", '"history" must be a list of [question, answer]')
    for said, answered in pairs:
        yield {"role": "user", "content": said}
        yield {"role": "assistant", "content": answered}


def _message(number: int, turn: Any, found: dict[str, list[str | None]]) -> dict[str, str]:
    """One turn in our form; what its parts refer to is added to `found`, None where a part names no file."""
    if not isinstance(turn, dict):
        raise BadSample("bad_record", f"message {number} is not a JSON object")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadSample("unknown_role", f"message {number}: {name!r} is none of {', '.join(_ROLES)}")
    if role == "tool" or not _is_empty(turn.get("tool_calls")) or not _is_empty(turn.get("function_call")):
        raise BadSample("unsupported_tool_call", f"message {number} calls a tool or is its answer")
    if turn.get("weight") == 0:
        raise BadSample("unsupported_weight", f"message {number} is not to be learned (weight 0): every answer is here")
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
    if isinstance(part, str):
        return literal(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return literal(part["text"])
    if kind not in _PARTS:
        raise BadSample("unsupported_content", f"message {number} has a part of type {kind!r}")
    field = _PARTS[kind]
    value = next((part[key] for key in (kind, "image_url", "image", "video", "url", "path") if part.get(key)), None)
    found[field].append(None if value is None else _reference(value))
    return _MEDIA[field][0]


def _reference(value: Any) -> str:
    """A path or a data: URI, given as such, as a file: URL or as {"url": ...}."""
    if isinstance(value, dict):
        value = value.get("url") or value.get("path")
    if not isinstance(value, str) or not value:
        raise BadSample("bad_record", "a picture or clip must be named by a path or a data: URI")
    if is_data_uri(value):
        return value
    if value[:7].lower() == "file://":
        return unquote(urlsplit(value).path)
    if "://" in value[:16]:
        raise BadSample("remote_file", f"{value[:200]}: nothing is fetched; save it beside the records")
    return value


def _matched(field: str, listed: list[str], found: list[str | None]) -> list[str]:
    """The files in the order of their placeholders: those that the parts name, or, where they name none, the record's
    own list."""
    named = [reference for reference in found if reference is not None]
    if not named:
        return listed
    if len(named) < len(found) or (listed and listed != named):
        raise BadSample("media_mismatch", f'{field} are named both in the messages and in the record\'s "{field}"')
    return named


def _is_empty(value: Any) -> bool:
    """Nothing, in the ways in which data sets write it: null, [], "", "[]"."""
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
