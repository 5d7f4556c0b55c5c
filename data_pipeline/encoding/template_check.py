"""Compare the chat template of a tokenizer's folder with the form in which chats are written.

Engines render prompts with the folder's template. If it is not the one that a form follows, a model would be served
with other prompts than it was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_pipeline.domains import chat
from data_pipeline.sample import Element, Image, Text, Token

_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_ASK = {"role": "user", "content": "<image>Is it cold?"}
_CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def _answer(text: str, thought: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    return {**turn, **({"reasoning_content": thought} if thought else {}), **({"tool_calls": calls} if calls else {})}


def _response(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


# What is compared: its name, the messages, whether the chat thinks, whether it has tools.
_CASES: tuple[tuple[str, list[dict[str, Any]], bool, bool], ...] = (
    ("chats", [{"role": "system", "content": "S"}, _ASK, _answer("No."), _ASK, _answer("Yes.", "Snow.")], True, False),
    ("chats without thinking", [_ASK, _answer("No."), _ASK, _answer("Yes.")], False, False),
    ("calls of tools", [_ASK, _answer("I look.", "Look.", _CALL, _CALL)], True, True),
    (
        "responses of tools",
        [_ASK, _answer("", "", _CALL), _response("-3"), _response("4"), _answer("Yes.")],
        False,
        True,
    ),
)


def template_difference(folder: Path, form: str) -> str | None:
    """Return what the template of a folder writes differently than a chat form; None if there is no difference."""
    template = _template_of(folder)
    if template is None:
        return None
    for name, messages, thinking, has_tools in _CASES:
        tools = [_TOOL] if has_tools else None
        elements = chat.render(
            [{**turn, "tool_calls": list(turn.get("tool_calls", ()))} for turn in messages],
            thinking,
            tools=tools,
            form=form,
        )[:-1]
        if _rendered(template, messages, thinking, tools, for_answer=False) != "".join(map(_written, elements)):
            return name
    return None


def prompt_difference(folder: Path, form: str) -> str | None:
    """Return what is wrong with the template of a folder for prompts in a chat form; None if nothing is.

    It has none, as those of many base models, or writes a prompt differently.
    """
    template = _template_of(folder)
    if template is None:
        return "there is no chat template"
    for thinking in (True,) if form == "glm41v" else (True, False):
        prompt = "".join(map(_written, chat.render_prompt([_ASK], thinking, form=form)))
        if _rendered(template, [_ASK], thinking, None, for_answer=True) != prompt:
            return f"the chat template writes prompts {'with' if thinking else 'without'} thinking differently"
    return None


def _rendered(
    template: str,
    messages: list[dict[str, Any]],
    thinking: bool,
    tools: list[dict[str, Any]] | None,
    *,
    for_answer: bool,
) -> str | None:
    """Return what a template writes; None if it fails."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    turns = [{**turn, "content": _parts(turn["content"])} for turn in messages]
    options = {"tools": tools, "enable_thinking": thinking, "add_generation_prompt": for_answer}
    try:
        return environment.from_string(template).render(messages=turns, **options)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None


def _template_of(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _parts(content: str) -> Any:
    if not content.startswith("<image>"):
        return content
    return [{"type": "image"}, {"type": "text", "text": content.removeprefix("<image>")}]


def _written(element: Element) -> str:
    if isinstance(element, Text | Token):
        return element.text if isinstance(element, Text) else element.name
    return _IMAGE if isinstance(element, Image) else ""
