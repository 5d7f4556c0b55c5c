r"""Chats as GLM-4.5V, GLM-4.6V and GLM-4.1V write them, with loss only on the assistant's text and calls of tools.

GLM-4.5V and GLM-4.6V, thinking (loss on what is underlined):

    [gMASK]<sop><|user|>\nQ1<|assistant|>\n<think></think>\nA1
    <|user|>\nQ2<|assistant|>\n<think>T2</think>\nA2<|user|>
                               -----------------------------

  Reasoning is kept after the last user message only. Earlier answers are context: without their reasoning a thinking
  assistant would not have given them, so they carry no loss.

GLM-4.5V and GLM-4.6V, not thinking: "/nothink" ends every user turn and the empty thought is part of the prompt.

    [gMASK]<sop><|user|>\nQ1/nothink<|assistant|>\n<think></think>\nA1<|user|>
                                                                    ----------
    \nQ2/nothink<|assistant|>\n<think></think>\nA2<|user|>
                                                ----------

GLM-4.1V: turns are written as they are, reasoning included, and all answers carry loss.

The token that ends an answer carries loss with it: <|user|>, which begins the next turn and is appended after the last.
A call of a tool ends with <|observation|>, which begins the response (tool_calls.py).

An assistant's message with "loss": false is context in all forms: neither its text nor the token that ends it carries
loss.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from data_pipeline.domains import tool_calls
from data_pipeline.domains.documents import split_placeholders
from data_pipeline.domains.thoughts import check_tags, split_reasoning
from data_pipeline.domains.tool_calls import ToolForm
from data_pipeline.errors import BadSample
from data_pipeline.sample import ROLE_TOKENS, Element, Text, Token

Turn = dict[str, Any]

DEFAULT_FORM = "glm45v"
NO_THINK = "/nothink"
# Keys by which other tools mark answers as learned (1, true) or not; and as not learned (1, true). A build writes them
# as "loss".
LEARNED_MARKS = ("loss_weight", "loss_mask", "train", "training", "trainable", "learn", "weight")
MASKED_MARKS = ("mask", "masked", "ignore", "ignore_loss", "mask_loss")
_NOT_LEARNED = {
    **dict.fromkeys(LEARNED_MARKS, ("0", "0.0", "false", "no")),
    **dict.fromkeys(MASKED_MARKS, ("1", "1.0", "true", "yes")),
}


def render(messages: Any, thinking: Any, *, tools: Any = None, form: str = DEFAULT_FORM) -> list[Element]:
    """Return the elements of a chat.

    Args:
        messages: [{"role": system | user | assistant | tool, "content": str[, "reasoning_content": str, "loss": bool,
            "tool_calls": [{"name": str, "arguments": {...}}]]}, ...], the last of an assistant. An assistant's content
            may itself begin with <think>...</think>.
        thinking: bool, whether the chat is written in thinking form. None: yes if an answer after the last user message
            has reasoning and carries loss.
        tools: The schemas of the functions that the assistant may call.
        form: One of CHAT_FORMS.

    Raises:
        BadSample: The chat cannot be written in this form, or no answer carries loss.
    """
    turns = _check_messages(messages)
    if turns[-1]["role"] != "assistant":
        detail = f"the last message is the {turns[-1]['role']}'s: a chat to learn from ends with an answer"
        raise BadSample("bad_record", detail)
    chat, learned = _written(turns, thinking, tools, form)
    if not any(learned):
        raise BadSample("nothing_to_learn", "no answer of this chat carries loss")
    next_role = "tool" if turns[-1].get("tool_calls") else "user"
    return [*chat, Token(ROLE_TOKENS[next_role], loss=learned[-1])]


def render_prompt(messages: Any, thinking: Any, *, tools: Any = None, form: str = DEFAULT_FORM) -> list[Element]:
    """Return the elements of a chat up to where the assistant begins to write. Nothing in it carries loss.

    The same as a chat template renders with `add_generation_prompt`.

    Args:
        messages: As for `render`, the last of a user.
        thinking: bool, whether the assistant is to think first. None: yes, as templates do.
        tools: As for `render`.
        form: One of CHAT_FORMS.

    Raises:
        BadSample: The prompt cannot be written in this form.
    """
    turns = [{**turn, "loss": False} if turn["role"] == "assistant" else turn for turn in _check_messages(messages)]
    if turns[-1]["role"] != "user":
        detail = f"the last message is the {turns[-1]['role']}'s: a prompt ends with a user's, which is answered"
        raise BadSample("bad_record", detail)
    question = turns[-1]["content"].rstrip()
    if not question:
        raise BadSample("bad_record", "the last message is empty: a prompt asks something")
    if form != "glm41v" and thinking is not False and question.endswith(NO_THINK):
        raise BadSample(
            "bad_record", f'the question ends with {NO_THINK}: write "thinking": false without it, or remove it'
        )
    prompt, _ = _written(turns, True if thinking is None else thinking, tools, form)
    empty_thought: list[Element] = [Token("<think>"), Token("</think>"), Text("\n")]
    return [*prompt, Token(ROLE_TOKENS["assistant"]), Text("\n"), *(empty_thought if thinking is False else [])]


def _written(turns: list[Turn], thinking: Any, tools: Any, form: str) -> tuple[list[Element], list[bool]]:
    """Return the elements of all turns, each after the token of its role, and which turns carry loss."""
    given = tool_calls.read_tools(tools)
    uses_tools = bool(given) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
    tool_form = tool_calls.check_form(form, uses_tools=uses_tools)
    if thinking is not None and not isinstance(thinking, bool):
        raise BadSample("bad_record", f'"thinking" is {str(thinking)[:40]!r}: it must be true or false')
    elements, learned = _FORMS[form](turns, thinking, tool_form)
    chat: list[Element] = [Token("[gMASK]"), Token("<sop>"), *tool_calls.tool_list(given)]
    for index, turn in enumerate(turns):
        if turn["role"] != "tool" or turns[index - 1]["role"] != "tool":
            chat.append(Token(ROLE_TOKENS[turn["role"]], loss=index > 0 and learned[index - 1]))
        chat += elements[index]
    return chat, learned


def _glm45v(turns: list[Turn], thinking: bool | None, tools: ToolForm | None) -> tuple[list[list[Element]], list[bool]]:
    last_user = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    answers = {index: split_reasoning(turn) for index, turn in enumerate(turns) if turn["role"] == "assistant"}
    if thinking is None:
        thinking = any(answers[index][0] for index in answers if index > last_user and _is_learned(turns[index]))
    learned = [_is_learned(turn) and (not thinking or index > last_user) for index, turn in enumerate(turns)]

    elements: list[list[Element]] = []
    for index, turn in enumerate(turns):
        if turn["role"] == "system":
            elements.append([Text("\n"), *split_placeholders(turn["content"], loss=False)])
        elif turn["role"] == "tool" and tools:
            elements.append(tool_calls.response_elements(turn["content"], tools))
        elif turn["role"] == "user":
            content = turn["content"] if thinking else turn["content"].removesuffix(NO_THINK)
            elements.append(
                [Text("\n"), *split_placeholders(content, loss=False), *([] if thinking else [Token(NO_THINK)])]
            )
        elif thinking and index > last_user:
            reasoning, answer = answers[index]
            if not reasoning:
                raise BadSample(
                    "missing_reasoning", "a thinking chat whose answer has no reasoning: set thinking to false"
                )
            thought = _thought(reasoning, loss=learned[index])
            elements.append([Text("\n"), *thought, *_answer(answer, turn, loss=learned[index])])
        else:
            empty_thought: list[Element] = [Text("\n"), Token("<think>"), Token("</think>"), Text("\n")]
            elements.append([*empty_thought, *_answer(answers[index][1], turn, loss=learned[index])])
    return elements, learned


def _glm41v(turns: list[Turn], thinking: bool | None, tools: ToolForm | None) -> tuple[list[list[Element]], list[bool]]:
    if thinking is False:
        raise BadSample("chat_form", "GLM-4.1V has no form for chats without thinking")
    elements: list[list[Element]] = []
    for turn in turns:
        if turn["role"] == "assistant":
            check_tags(turn)
            loss, reasoning, answer = _is_learned(turn), turn.get("reasoning_content"), turn["content"]
            if "</think>" in answer and "<think>" not in answer:  # as written by models whose prompt ends with <think>
                answer = f"<think>{answer}"
            thought = _thought(reasoning, loss=loss) if reasoning else []
            elements.append([Text("\n"), *thought, *_answer(answer, turn, loss=loss)])
        else:
            elements.append([Text("\n"), *split_placeholders(turn["content"], loss=False)])
    return elements, [_is_learned(turn) for turn in turns]


_FORMS: dict[str, Callable[[list[Turn], bool | None, ToolForm | None], tuple[list[list[Element]], list[bool]]]] = {
    "glm45v": _glm45v,
    "glm46v": _glm45v,
    "glm41v": _glm41v,
}
CHAT_FORMS = tuple(_FORMS)


def _is_learned(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and turn.get("loss") is not False


def _thought(reasoning: str, *, loss: bool) -> list[Element]:
    return [Token("<think>", loss), Text(reasoning, loss, True), Token("</think>", loss), Text("\n", loss, True)]


def _answer(content: str, turn: Turn, *, loss: bool) -> list[Element]:
    calls = turn.get("tool_calls", [])
    if not content.strip() and not calls:
        raise BadSample("empty_answer", "an assistant's turn has no answer")
    written = split_placeholders(content, loss=loss, tags=True) if content.strip() else []
    return [*written, *tool_calls.call_elements(calls, follows_text=bool(written), loss=loss)]


def _check_messages(messages: Any) -> list[Turn]:
    """Return the messages, with their calls as read_calls gives them."""
    if not isinstance(messages, list) or not messages:
        raise BadSample("bad_record", 'a conversation or prompt needs a non-empty list "messages"')
    turns: list[Turn] = []
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or turn.get("role") not in tuple(ROLE_TOKENS):
            raise BadSample("bad_record", f"message {number} needs a role: one of {', '.join(ROLE_TOKENS)}")
        calls = tool_calls.read_calls(number, turn.get("tool_calls"))
        if calls and turn["role"] != "assistant":
            raise BadSample("bad_tool_call", f"message {number} ({turn['role']}) has tool_calls: only answers can")
        content = turn.get("content") or "" if calls else turn.get("content")  # OpenAI writes null beside calls
        texts = {"content": content, "reasoning_content": turn.get("reasoning_content") or ""}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise BadSample("bad_record", f"message {number} ({turn['role']}): {name} must be a string")
        if turn["role"] == "assistant":
            _check_fields(number, turn)
        if not isinstance(turn.get("loss", True), bool):
            raise BadSample("bad_record", f'message {number} ({turn["role"]}): "loss" must be true or false')
        turns.append({**turn, "content": content, "tool_calls": calls})
    roles = [turn["role"] for turn in messages]
    if any(pair == ("assistant", "assistant") for pair in pairwise(roles)):
        raise BadSample("bad_record", "two assistant messages follow each other: join them")
    _check_responses(turns)
    return turns


def _check_responses(turns: list[Turn]) -> None:
    """Check that calls are followed by responses, and responses follow calls: the token between them is learned."""
    for number, (turn, following) in enumerate(pairwise([{"role": ""}, *turns])):
        called = bool(turn.get("tool_calls")) or (turn["role"] == "assistant" and "<tool_call>" in turn["content"])
        if following["role"] == "tool" and not called and turn["role"] != "tool":
            raise BadSample(
                "unmatched_tool_response", f"message {number} is a tool's response, but no call is before it"
            )
        if turn.get("tool_calls") and following["role"] != "tool":
            raise BadSample("unanswered_tool_call", f"message {number - 1} calls a tool, but no response follows it")


def _check_fields(number: int, answer: dict[str, Any]) -> None:
    """Reject an answer with a field of another format that changes its meaning and would be ignored."""
    for name in answer if answer.get("loss") is not False else ():
        if name in _NOT_LEARNED and str(answer[name]).lower() in _NOT_LEARNED[name]:
            detail = f'message {number} has {name} {answer[name]}, but would be learned: write "loss": false'
            raise BadSample("unsupported_weight", detail)
    if answer.get("function_call"):
        raise BadSample("unsupported_tool_call", f'message {number} has function_call: write it as "tool_calls"')
    for name in ("reasoning", "thinking"):
        if answer.get(name) and not answer.get("reasoning_content"):
            raise BadSample("bad_record", f'message {number} has {name}: call it "reasoning_content"')
