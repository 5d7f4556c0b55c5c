"""Conversations in the formats of other tools, converted to records of the domain `chat`.

    ShareGPT, LLaVA      {"conversations": [{"from": "human", "value": "<image>What is it?"},
                                            {"from": "gpt", "value": "A cat."}], "image": "cat.jpg"}
    LLaMA-Factory        {"messages": [{"role": "user", "content": "<image>What is it?"}, ...], "images": ["cat.jpg"]}
    Alpaca               {"instruction": "What is it?", "input": "", "output": "A cat.", "history": [["Hi", "Hello"]]}
    ms-swift             {"query": "<image>What is it?", "response": "A cat.", "images": ["cat.jpg"]}
    OpenAI               {"messages": [{"role": "user", "content": [
                              {"type": "image_url", "image_url": {"url": "cat.jpg"}},
                              {"type": "text", "text": "What is it?"}]}, ...]}

All become

    {"domain": "chat", "messages": [{"role": "user", "content": "<image>What is it?"},
                                    {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

with `reasoning_content` and `thinking` where they are given, "loss": false where an answer is not to be learned
(chat_masks.py), and all other fields of the record and keys of its messages. Images and videos stay paths or data:
URIs.

    tools, calls and responses: chat_tools.py
    turns in all their forms: chat_turns.py    parts of a message: chat_parts.py    marks of images: chat_marks.py
    marks of boxes: chat_objects.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Draft, Media, Rejected
from data_pipeline.inputs.records import chat_marks, chat_masks, chat_objects, chat_parts, chat_tools, chat_turns
from data_pipeline.inputs.records.chat_turns import count_messages
from data_pipeline.inputs.records.record_fields import as_list
from data_pipeline.sample import ROLE_TOKENS

_ROLE_NAMES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "ai"),
    "system": ("system", "developer"),
    "tool": chat_tools.RESPONSE_ROLES,
    "call": chat_tools.CALL_ROLES,
}
_ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
# Field of a `chat` record -> its placeholder, and the names under which a record may list its files.
_MEDIA = {"images": ("<image>", ("images", "image")), "videos": ("<video>", ("videos", "video"))}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_AUDIO = ("audio", "audios")
_NO_TEXT = "system message without text"
# Fields that the conversion uses up, besides those of the turns. All others are kept in the record.
_CONSUMED = {
    *("domain", "thinking", "enable_thinking", *chat_tools.TOOLS, *_AUDIO),
    *(name for _, names in _MEDIA.values() for name in names),
}


def is_foreign_chat(record: dict[str, Any]) -> bool:
    """Return whether a record is a conversation that `normalise` must convert."""
    if "domain" in record and record["domain"] != "chat":
        return False
    messages = record.get("messages")
    if "domain" in record and isinstance(messages, list) and "conversations" not in record:
        return _has_more_than_own(record) or not all(map(_is_plain_turn, messages))
    record = chat_turns.parsed(record)
    if "conversations" in record or ("instruction" in record and "output" in record):
        return True
    if chat_turns.list_name(record) is not None:
        return isinstance(record.get("messages", []), list)
    answers = {key: value for key, value in record.items() if key not in chat_masks.KTO_TAGS}  # also of other data
    return chat_turns.pair_names(record) is not None or _is_preference(answers)


def normalise(record: dict[str, Any], notes: Counter[str] | None = None) -> dict[str, Any]:
    """Convert a conversation in any of the formats above to a record of the domain `chat`.

    "images" and "videos" become lists of paths or data: URIs, one per <image> and <video> in the messages, in order.
    If a record has images but no placeholder at all, the placeholders go before the text of the first user turn.

    Args:
        record: The conversation.
        notes: Counts what of it is in no field of the result, by name, as `Draft.not_read`.

    Raises:
        BadSample: bad_record, unknown_role, bad_tools, bad_tool_call, unsupported_tool_call, unsupported_audio,
            unsupported_content, unsupported_weight, preference_pair, preference_data, nothing_to_learn, remote_file or
            media_mismatch.
    """
    record = chat_turns.parsed(record)
    _check_supported(record)
    given, used = chat_turns.turns(record)
    found = chat_parts.Found(notes=Counter() if notes is None else notes)
    listed, named = _listed_files(record)
    has_parts = any(map(chat_parts.has_files, given))
    escape = has_parts or not any(listed.values())
    messages = [_message(number, turn, found, escape) for number, turn in enumerate(given)]
    used |= _apply_marks_of_record(record, messages)
    tools = chat_tools.tools_of(record)
    if tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages):
        chat_tools.convert_texts(messages)
    calls = {number for number, turn in enumerate(given) if _role(number, turn) == "call"}
    messages = chat_tools.join_calls(messages, calls, found.notes)
    kept = [turn for turn in messages if turn["content"] or turn["role"] != "system"]
    if len(kept) < len(messages):
        found.notes[_NO_TEXT] += len(messages) - len(kept)
    normalised: dict[str, Any] = {"domain": "chat", "messages": kept}
    thinking = record.get("thinking", record.get("enable_thinking"))
    if thinking is not None and thinking != "":
        normalised["thinking"] = thinking  # rendering rejects what is neither true nor false
    if tools:
        normalised["tools"] = tools
    if named:
        listed["images"] = chat_marks.replace_names(kept, named)
    elif not has_parts:
        listed = chat_marks.place_files(kept, listed)
    for field in _MEDIA:
        if files := _matched_files(field, kept, listed[field], found.files[field]):
            normalised[field] = files
    return {**normalised, **{key: value for key, value in record.items() if key not in _CONSUMED | used}}


def normalise_nameless(
    record: dict[str, Any], media: dict[str, list[Media]], notes: Counter[str] | None = None
) -> tuple[dict[str, Any], dict[str, list[Media]]]:
    """Convert a conversation whose files are in memory and have no names.

    Args:
        record: The conversation.
        media: Its files, by "images" and "videos".
        notes: As in `normalise`.

    Returns:
        The record of the domain `chat`, and the files in the order of their placeholders.

    Raises:
        BadSample: As `normalise`.
    """
    for field, (_, names) in _MEDIA.items():
        named = [name for name in names if not _is_empty(record.get(name))]
        if named and not media.get(field):
            raise BadSample("missing_file", f'"{named[0]}" names {field}, but the files are not beside the record')
        if notes is not None:
            notes.update(f"field {name}" for name in named)  # the files themselves are given
        record = {key: value for key, value in record.items() if key not in named}
    numbers = {field: [str(number) for number in range(len(files))] for field, files in media.items()}
    record = normalise({**record, **numbers}, notes)
    return record, {field: [_file_of(name, files) for name in record.pop(field, [])] for field, files in media.items()}


def _file_of(name: str, files: list[Media]) -> Media:
    if not name.isdecimal() or int(name) >= len(files):  # a path in a part or mark of a message
        raise BadSample("missing_file", f"a message names {name[:80]}, but the file is not beside the record")
    return files[int(name)]


def finished(draft: Draft, raw: Any, notes: Mapping[str, int] | None = None) -> Draft:
    """Return the draft of a chat with its boxes written, and with accounts of its messages; any other draft unchanged.

    Args:
        draft: The draft, with its images.
        raw: The record as it was given.
        notes: What `normalise` noted.

    Raises:
        BadSample: As `chat_objects.fill`.
    """
    if draft.record.get("domain") != "chat" or not isinstance(draft.record.get("messages"), list):
        return draft
    draft = replace(draft, record=chat_objects.fill(draft.record, draft.images))
    not_read = Counter(draft.not_read) + Counter(notes or {})
    joined = not_read.pop(chat_tools.JOINED, 0)
    not_read += Counter({"field text": int(bool(draft.record.get("text")))})
    given = {"messages": count_messages(raw)}
    items = {"messages": len(draft.record["messages"]) + joined + not_read[_NO_TEXT]}
    return replace(draft, given={**draft.given, **given}, items={**draft.items, **items}, not_read=dict(not_read))


def finished_rejection(rejected: Rejected, raw: Any) -> Rejected:
    """Return the rejection of a record with accounts of its messages.

    Args:
        rejected: The rejection.
        raw: The record as it was given, parsed or as JSON; None if it is not known.
    """
    messages = count_messages(raw)
    if not messages:
        return rejected
    given, items = ({**counted, "messages": messages} for counted in (rejected.given, rejected.items))
    return replace(rejected, given=given, items=items)


def _check_supported(record: dict[str, Any]) -> None:
    if any(not _is_empty(record.get(key)) for key in _AUDIO):
        raise BadSample("unsupported_audio", "the record contains audio, which the model does not support")
    if "chosen" in record and "rejected" in record:
        raise BadSample("preference_pair", "a pair of answers to choose from is not a conversation to learn")
    chat_masks.check_preference(record)


def _is_preference(record: dict[str, Any]) -> bool:
    return ("chosen" in record and "rejected" in record) or chat_masks.is_preference(record)


def _has_more_than_own(record: dict[str, Any]) -> bool:
    """Return whether a record of the domain `chat` has fields whose meaning `normalise` knows."""
    has_audio = any(not _is_empty(record.get(key)) for key in _AUDIO)
    is_own = chat_tools.is_own_tools(record) and not has_audio
    return not is_own or chat_masks.has_record_mark(record) or _is_preference(record)


def _is_plain_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and turn.get("role") in tuple(ROLE_TOKENS)
        and isinstance(turn.get("content"), str)
        and not chat_masks.has_foreign_mark(turn)
        and chat_tools.is_own_calls(turn)
        and not chat_objects.has_marks(turn["content"])
    )


def _message(number: int, turn: Any, found: chat_parts.Found, escape: bool) -> dict[str, Any]:
    """Return one turn as a message of a `chat` record, with the keys that it does not know."""
    if not isinstance(turn, dict):
        raise BadSample("bad_record", f"message {number} is not a JSON object")
    role, calls = _role(number, turn), chat_tools.calls_of(number, turn)
    key = chat_parts.content_key(turn)
    content, thoughts = turn.get(key), ""
    if role == "call":
        role, (content, called) = "assistant", chat_tools.split_call(number, content)
        calls += called
    if calls and content is None:
        content = ""
    if isinstance(content, list):
        content, thoughts = chat_parts.read_parts(number, content, found, escape=escape)
    if not isinstance(content, str):
        raise BadSample("bad_record", f"message {number} ({role}): its content is neither a text nor a list of parts")
    message: dict[str, Any] = {"role": role, "content": content}
    reasoning_key = next((key for key in _REASONING if turn.get(key) and isinstance(turn[key], str)), "")
    reasoning = "\n".join(filter(None, (turn.get(reasoning_key), thoughts)))
    if reasoning and role == "assistant":
        message["reasoning_content"] = reasoning
    elif reasoning:
        found.notes[f"reasoning of a message of the {role}"] += 1
    if calls:
        message["tool_calls"] = calls
    chat_masks.mark(message, chat_masks.is_learned(f"message {number}", turn), found.notes)
    read = {"role" if "role" in turn else "from", key, reasoning_key, *chat_tools.CALLS, *chat_masks.MARKS}
    rest = {key: value for key, value in turn.items() if key not in read and value is not None and value != ""}
    if clash := rest.keys() & message.keys():
        raise BadSample("bad_record", f"message {number}: {', '.join(sorted(clash))} is given twice")
    return {**message, **rest}


def _role(number: int, turn: dict[str, Any]) -> str:
    """Return the role of a turn, a key of _ROLE_NAMES. Raises BadSample: unknown_role."""
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadSample("unknown_role", f"message {number}: the role {str(name)[:40]!r} is none of {', '.join(_ROLES)}")
    return role


def _apply_marks_of_record(record: dict[str, Any], messages: list[dict[str, Any]]) -> set[str]:
    """Obey the marks that a record has for its messages. Returns the names of these fields."""
    learned, used = chat_masks.marks_of_record(record, [turn["role"] for turn in messages])
    for number, verdict in learned.items():
        if messages[number]["role"] == "assistant" and not verdict:
            messages[number]["loss"] = False
    return used


def _listed_files(record: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the files that the record lists by field, and those that it lists by their marks (MiniCPM-V)."""
    image = record.get("image")
    if isinstance(image, dict) and image and all(key.startswith("<") for key in image):
        named = {mark: chat_parts.reference(value) for mark, value in image.items()}
        record = {key: value for key, value in record.items() if key != "image"}
    else:
        named = {}
    listed = {
        field: [chat_parts.reference(entry) for name in names for entry in as_list(record.get(name))]
        for field, (_, names) in _MEDIA.items()
    }
    return listed, named


def _matched_files(
    field: str, messages: list[dict[str, Any]], listed: list[str], found: list[str | int | None]
) -> list[str]:
    """Return the files of the placeholders in the messages. Writes the placeholders if there are none.

    Raises:
        BadSample: media_mismatch.
    """
    placeholder = _MEDIA[field][0]
    files = _choose_files(field, listed, found)
    if files and not any(placeholder in turn["content"] for turn in messages):
        first = next((turn for turn in messages if turn["role"] == "user"), None)
        if first is None:
            raise BadSample("media_mismatch", f"{len(files)} {field}, but no user turn to put them in")
        first["content"] = placeholder * len(files) + first["content"]
    written = sum(turn["content"].count(placeholder) for turn in messages)
    if written != len(files):
        raise BadSample("media_mismatch", f"{written} {placeholder} in the text but {len(files)} {field}")
    return files


def _choose_files(field: str, listed: list[str], found: list[str | int | None]) -> list[str]:
    """Return the files in the order of their placeholders.

    These are the files that the parts of messages name or, if they name none, those that the record lists.
    """
    numbers = [number for number in found if isinstance(number, int)]
    if found and len(numbers) == len(found):
        if set(numbers) != set(range(len(listed))):
            raise BadSample("media_mismatch", f"the parts name the {field} {numbers} of {len(listed)}, from 0")
        return [listed[number] for number in numbers]
    named = [reference for reference in found if isinstance(reference, str)]
    if not named and not numbers:
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
