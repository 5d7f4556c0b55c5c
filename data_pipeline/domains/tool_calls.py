r"""Tools in a chat: the list of them, the assistant's calls, and the tools' responses.

    [gMASK]<sop><|system|>\n# Tools\n\nYou may call ... <tools>\n{"type": "function", ...}\n</tools>\n\nFor each ...
    <|user|>\nIs it cold in Oslo?<|assistant|>\n<think>I look it up.</think>\n
    <tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>
    <|observation|>\n<tool_response>\n-3 degrees\n</tool_response><|assistant|>\n<think>...

Strings are written as they are, other values of arguments as JSON. Neither the list nor a response carries loss. Text
in any of them stays text, even if it looks like one of the tags.

The models differ in responses, and this is written as their published templates do it:

    GLM-4.1V    has no tools
    GLM-4.5V    a response is text
    GLM-4.6V    a response may hold images and videos; one of text alone has a line break after </tool_response>
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.domains.documents import split_placeholders
from data_pipeline.errors import BadSample
from data_pipeline.sample import ROLE_TOKENS, Element, Text, Token

Call = tuple[str, dict[str, Any]]  # the name of the tool, and the arguments

_BEFORE_TOOLS = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_AFTER_TOOLS = """</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
<arg_key>{arg-key-2}</arg_key>
<arg_value>{arg-value-2}</arg_value>
...
</tool_call>"""
_TAG = re.compile("(</?(?:tool_call|arg_key|arg_value)>)")


@dataclass(frozen=True)
class ToolForm:
    """How a model is shown the responses of tools."""

    has_media: bool  # whether a response may hold images and videos
    after_text: str  # what follows a response without any


# Chat form -> how it writes tools. A form that is not here cannot.
TOOL_FORMS = {"glm45v": ToolForm(has_media=False, after_text=""), "glm46v": ToolForm(has_media=True, after_text="\n")}


def check_form(form: str, *, uses_tools: bool) -> ToolForm | None:
    """Return how a chat form writes tools.

    Raises:
        BadSample: `unsupported_tool_call`, if a chat uses tools and its form has none.
    """
    if uses_tools and form not in TOOL_FORMS:
        raise BadSample("unsupported_tool_call", f"the chat form {form} has no tools: use {' or '.join(TOOL_FORMS)}")
    return TOOL_FORMS.get(form)


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Return the tools of a record: a list of function schemas, which may be JSON.

    Raises:
        BadSample: `bad_tools`.
    """
    tools = _parsed(value)
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("bad_tools", f'"tools" is {str(value)[:80]!r}: it must be a list of function schemas')
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadSample("bad_tools", f"tool {number} has no name: {str(tool)[:80]}")
    return tools


def read_calls(number: int, value: Any) -> list[Call]:
    """Return the calls of a message: {"name", "arguments"}, which OpenAI has under "function".

    Raises:
        BadSample: `bad_tool_call`.
    """
    calls = _parsed(value)
    found: list[Call] = []
    for call in calls if isinstance(calls, list) else [calls] if calls else []:
        function = (call.get("function") or call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise BadSample("bad_tool_call", f"message {number} has a call without a name: {str(call)[:80]}")
        arguments = _parsed(function.get("arguments", function.get("parameters")))
        if arguments is None or arguments == "":
            arguments = {}
        if not isinstance(arguments, dict):
            raise BadSample("bad_tool_call", f"message {number}: the arguments of {name[:40]} are no JSON object")
        found.append((name, arguments))
    return found


def tool_list(tools: Sequence[dict[str, Any]]) -> list[Element]:
    """Return the elements of the list of tools, which begins a chat. None if there are no tools."""
    if not tools:
        return []
    schemas = "".join(_json(tool) + "\n" for tool in tools)
    after = [Token(part) if _TAG.fullmatch(part) else Text(part) for part in _TAG.split(_AFTER_TOOLS) if part]
    return [Token(ROLE_TOKENS["system"]), Text(_BEFORE_TOOLS), Text(schemas), *after]


def call_elements(calls: Sequence[Call], *, follows_text: bool, loss: bool) -> list[Element]:
    """Return the elements of an assistant's calls, which follow its text on a line of their own."""
    elements: list[Element] = []
    for name, arguments in calls:
        if follows_text or elements:
            elements.append(Text("\n", loss, tags=True))  # as the text is, so that both are encoded together
        elements += [Token("<tool_call>", loss), Text(f"{name}\n", loss)]
        for key, value in arguments.items():
            written = value if isinstance(value, str) else _json(value)
            elements += [Token("<arg_key>", loss), Text(key, loss), Token("</arg_key>", loss), Text("\n", loss)]
            elements += [Token("<arg_value>", loss), Text(written, loss), Token("</arg_value>", loss), Text("\n", loss)]
        elements.append(Token("</tool_call>", loss))
    return elements


def response_elements(content: str, form: ToolForm) -> list[Element]:
    """Return the elements of a tool's response, without the token that begins the first of several.

    Raises:
        BadSample: `unsupported_tool_call`, if the form has no images or videos here.
    """
    parts = split_placeholders(content, loss=False)
    has_media = not all(isinstance(part, Text) for part in parts)
    if has_media and not form.has_media:
        raise BadSample(
            "unsupported_tool_call", "this chat form has no image or video in a tool's response: use glm46v"
        )
    end: list[Element] = [] if has_media or not form.after_text else [Text(form.after_text)]
    return [
        Text("\n"),
        Token("<tool_response>"),
        Text("\n"),
        *parts,
        Text("\n"),
        Token("</tool_response>"),
        *end,
    ]


def _parsed(value: Any) -> Any:
    """Return a value that may be given as JSON; a text that is not JSON stays one."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
