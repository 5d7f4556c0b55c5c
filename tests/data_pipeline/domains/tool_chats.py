"""Random chats with tools, and the form in which transformers' `apply_chat_template` takes them."""

from __future__ import annotations

import random
import re
from typing import Any

TEXTS = (
    "It is cold.",
    "naïve café 🐈",
    "图中有一只猫",
    "Line 1\nline 2 ",
    "{x} 3.14 <b>",
    "a\n\nb",
    "(see below)",
    "Done!\n",
)
NAMES = ("get_weather", "zoom", "搜索", "calc.add", "open-page")


def random_tool_chat(rng: random.Random, form: str) -> dict[str, Any]:
    """Return a record of the domain `chat` whose calls are answered; its last message may be a call."""
    thinking = rng.random() < 0.5
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(TEXTS)})
    turns = rng.randint(1, 3)
    for turn in range(turns):
        messages.append({"role": "user", "content": _with_media(rng, ("", "", "<image>", "<video>"))})
        for _ in range(rng.randint(0, 3)):
            messages.append(_answer(rng, thinking, calls=rng.randint(1, 3)))
            responses = range(rng.randint(1, 3))
            media = ("", "", "<image>", "<video>") if form == "glm46v" else ("",)
            messages += [{"role": "tool", "content": _with_media(rng, media)} for _ in responses]
        messages.append(_answer(rng, thinking, calls=rng.randint(1, 2) * (turn == turns - 1 and rng.random() < 0.3)))
    record = {"domain": "chat", "messages": messages, "thinking": thinking}
    tools = [_tool(rng) for _ in range(rng.randint(0, 3))]
    return {**record, "tools": tools} if tools else record


def as_transformers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with images and videos as parts of their content."""
    return [{**message, "content": _parts(message["content"])} for message in messages]


def _parts(content: str) -> Any:
    if "<image>" not in content and "<video>" not in content:
        return content
    pieces = filter(None, re.split("(<image>|<video>)", content))
    return [{"type": piece[1:-1]} if piece[1:-1] in ("image", "video") else text_part(piece) for piece in pieces]


def text_part(text: str) -> dict[str, str]:
    """Return a part of a message with a text."""
    return {"type": "text", "text": text}


def _with_media(rng: random.Random, media: tuple[str, ...]) -> str:
    return "".join(rng.choice(media) + rng.choice(TEXTS) for _ in range(rng.randint(1, 2)))


def _answer(rng: random.Random, thinking: bool, calls: int) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": rng.choice(TEXTS) if not calls or rng.random() < 0.5 else "",
    }
    if thinking:
        answer["reasoning_content"] = rng.choice(TEXTS)
    if calls:
        answer["tool_calls"] = [
            {"name": rng.choice(NAMES), "arguments": {f"key {n}": _value(rng, 2) for n in range(rng.randint(0, 3))}}
            for _ in range(calls)
        ]
        if rng.random() < 0.5:  # as OpenAI nests them
            answer["tool_calls"] = [{"type": "function", "id": "1", "function": call} for call in answer["tool_calls"]]
    return answer


def _value(rng: random.Random, depth: int) -> Any:
    kinds = ["text", "number", "truth", "none", *(["list", "object"] if depth else [])]
    kind = rng.choice(kinds)
    if kind == "list":
        return [_value(rng, depth - 1) for _ in range(rng.randint(0, 2))]
    if kind == "object":
        return {name: _value(rng, depth - 1) for name in rng.sample(NAMES, rng.randint(0, 2))}
    return {"text": rng.choice(TEXTS), "number": rng.choice([0, -7, 3.5, 1e20]), "truth": True, "none": None}[kind]


def _tool(rng: random.Random) -> dict[str, Any]:
    properties = {name: {"type": "string", "description": rng.choice(TEXTS)} for name in rng.sample(NAMES, 2)}
    function = {"name": rng.choice(NAMES), "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function}
