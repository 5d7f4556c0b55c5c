"""The content of a chat's message: a text, or a list of parts with text, images, videos and reasoning.

OpenAI             {"type": "image_url", "image_url": {"url": "cat.jpg", "detail": "high"}}
transformers       {"type": "image", "url": "cat.jpg"}, {"type": "image", "index": 0}
Qwen-VL            {"image": "cat.jpg"}, {"text": "What is it?"}
LLaMA-Factory v1   {"type": "image_url", "value": "cat.jpg"}, {"type": "reasoning", "value": "Whiskers."}
Anthropic          {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "..."}}
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import BadSample
from data_pipeline.inputs.flow import escape_placeholders
from data_pipeline.inputs.references import is_data_uri

# "type" of a part of a message's content -> the field that its file goes to.
_FILES = {
    **dict.fromkeys(("image_url", "image", "input_image", "image_path"), "images"),
    **dict.fromkeys(("video_url", "video", "input_video", "video_path"), "videos"),
}
_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = ("reasoning", "thinking", "think", "reasoning_content")
_TOOLS = ("tool_call", "tool_calls", "tools", "tool_use", "tool_result", "tool_response", "function_call", "function")
_KINDS = (*_FILES, *_TEXTS, *_THOUGHTS, *_TOOLS)
_CONTENT = ("content", "value", "parts", "text")  # keys of a message with its text or parts
_VALUES = ("value", "content", "image_url", "image", "video", "url", "path", "source", "text")
_PLACEHOLDERS = {"images": "<image>", "videos": "<video>"}


@dataclass
class Found:
    """What the parts of a record's messages hold besides text."""

    # Each file: its path, its number in the list of the record, or None if it is not named.
    files: dict[str, list[str | int | None]] = field(default_factory=lambda: {name: [] for name in _PLACEHOLDERS})
    notes: Counter[str] = field(default_factory=Counter)  # what of the parts is not read, by name


def read_parts(number: int, parts: list[Any], found: Found, *, escape: bool) -> tuple[str, str]:
    """Return the text and the reasoning of a message's content in parts.

    Args:
        number: The number of the message.
        parts: The parts.
        found: Gets the files and what is not read.
        escape: Whether a literal <image> in a text is a word, because files have parts of their own.

    Raises:
        BadSample: bad_record, unsupported_content, unsupported_tool_call or remote_file.
    """
    text, thoughts = "", ""
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = _kind(part)
        if kind in _TOOLS:
            raise BadSample(
                "unsupported_tool_call", f"message {number} has a tool call or its result as a part of its content"
            )
        if kind not in _KINDS:
            raise BadSample("unsupported_content", f"message {number} has a part of type {str(kind)[:40]!r}")
        names = ("text",) if kind in _TEXTS else (kind,)
        name = next((key for key in (*names, *_VALUES) if part.get(key)), None)
        value = None if name is None else part[name]
        read = {"type", *([name] if name else [])}
        if kind in _FILES:
            if value is None and isinstance(part.get("index"), int):
                value, read = part["index"], {*read, "index"}
            found.files[_FILES[kind]].append(value if value is None or isinstance(value, int) else reference(value))
            text += _PLACEHOLDERS[_FILES[kind]]
            if isinstance(value, dict):
                _note(value, {"url", "path", "type", "media_type", "data", "base64"}, found.notes)
        elif not isinstance(value or "", str):
            raise BadSample("unsupported_content", f"message {number}: the {name!r} of a part is not a text")
        elif kind in _TEXTS:
            text += escape_placeholders(value or "") if escape else value or ""
        else:
            thoughts += value or ""
        _note(part, read, found.notes)
    return text, thoughts


def content_key(turn: dict[str, Any]) -> str:
    """Return the key with the content of a message: the first that has any."""
    return next(
        (key for key in _CONTENT if turn.get(key)),
        next((key for key in _CONTENT if turn.get(key) is not None), _CONTENT[0]),
    )


def has_files(turn: Any) -> bool:
    """Return whether a message has parts that stand for files."""
    content = turn.get(content_key(turn)) if isinstance(turn, dict) else None
    return isinstance(content, list) and any(_kind(part) in tuple(_FILES) for part in content if isinstance(part, dict))


def reference(value: Any) -> str:
    """Return a path or data: URI that is given as such, as a file: URL, as {"url": ...} or in base64.

    Raises:
        BadSample: bad_record or remote_file.
    """
    if isinstance(value, dict):
        if value.get("type") == "base64" and isinstance(value.get("data"), str):
            value = f"data:{value.get('media_type') or 'image/png'};base64,{value['data']}"
        else:
            value = value.get("url") or value.get("path")
    if not isinstance(value, str) or not value:
        raise BadSample("bad_record", "an image or video must be given as a path or a data: URI")
    if is_data_uri(value):
        return value
    if value[:7].lower() == "file://":
        try:
            return unquote(urlsplit(value).path)
        except ValueError as error:
            raise BadSample("missing_file", f"{value[:200]}: {error}") from error
    if "://" in value[:16]:
        raise BadSample("remote_file", f"{value[:200]}: nothing is downloaded; save it beside the records")
    return value


def _kind(part: Any) -> Any:
    """Return the type of a part; that of a part without "type" is its only key that names one."""
    if not isinstance(part, dict):
        return None
    if part.get("type") is not None:
        return part["type"]
    named = [key for key in _KINDS if part.get(key) is not None]
    return named[0] if len(named) == 1 else None


def _note(values: dict[str, Any], read: set[str], notes: Counter[str]) -> None:
    notes.update(f"part key {key}" for key, value in values.items() if key not in read and value is not None)
