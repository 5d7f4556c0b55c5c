"""Chats with tools: text against published templates, tokens and loss against transformers' `apply_chat_template`."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.media.video_sampling import VideoGeometry
from data_pipeline.sample import Image, Sample, Text, Token
from tests.data_pipeline.domains.make_chat_goldens import CHATS, GOLDENS
from tests.data_pipeline.domains.tool_chats import as_transformers, random_tool_chat

FORMS = ("glm45v", "glm46v")
IMAGE, VIDEO = "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
ASK: dict[str, Any]
ANSWER: dict[str, Any]
CALL: dict[str, Any]
ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "zoom", "arguments": {"n": 2, "on": "cat"}}]}
RESPONSE = {"role": "tool", "content": "42"}
ZOOM = {"type": "function", "function": {"name": "zoom"}}


@pytest.fixture(scope="module")
def hf(tokenizer_folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def build(record: dict[str, Any], form: str) -> Sample:
    contents = "".join(turn["content"] for turn in record["messages"])
    return build_sample(record, images=contents.count("<image>"), videos=contents.count("<video>"), chat_form=form)


def chat(*messages: dict[str, Any], form: str = "glm46v", **fields: Any) -> Sample:
    return build({"domain": "chat", "messages": list(messages), **fields}, form)


def as_text(sample: Sample, *, learned: bool = False) -> str:
    """Return what the elements stand for, or those that carry loss, as a template writes them."""
    parts = []
    for element in sample.elements:
        if isinstance(element, Text | Token):
            if element.loss or not learned:
                parts.append(element.text if isinstance(element, Text) else element.name)
        elif not learned:
            parts.append(IMAGE if isinstance(element, Image) else VIDEO)
    return "".join(parts)


def rendered(
    messages: list[dict[str, Any]], record: dict[str, Any], form: str, hf: Any, *, prompt: bool = False
) -> str:
    return hf.apply_chat_template(
        as_transformers(messages),
        tools=record.get("tools"),
        chat_template=CHAT_TEMPLATES[form],
        enable_thinking=record["thinking"],
        add_generation_prompt=prompt,
        tokenize=False,
    )


def end_of(record: dict[str, Any]) -> str:
    return "<|observation|>" if record["messages"][-1].get("tool_calls") else "<|user|>"


@pytest.mark.fast
@pytest.mark.parametrize("form", FORMS)
def test_text_equals_that_of_the_published_template(form: str, hf: Any) -> None:
    chats = json.loads(GOLDENS.read_text(encoding="utf-8"))[form]["chats"]
    assert len(chats) == CHATS
    for golden in chats:
        record = golden["record"]
        assert as_text(build(record, form)) == golden["rendered"] + end_of(record)
        assert rendered(record["messages"], record, form, hf) == golden["rendered"]


@pytest.mark.fast
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_tokens_and_loss_equal_those_of_the_template(form: str, count: int, hf: Any, tokenizer: GlmTokenizer) -> None:
    """An answer is what follows the prompt that asks for it; in a thinking chat, after the last user message only."""
    video = VideoGeometry((0, 1), (0,), ("0",), (28, 28))
    calls = 0
    for seed in range(count):
        record = random_tool_chat(random.Random(1000 + seed), form)
        messages = record["messages"]
        sample = build(record, form)
        contents = "".join(turn["content"] for turn in messages)
        tokens = tokenize(sample, tokenizer, [(2, 2)] * contents.count("<image>"), [video] * contents.count("<video>"))
        text = rendered(messages, record, form, hf) + end_of(record)
        expanded = text.replace(VIDEO, f"<|begin_of_video|>{IMAGE}0<|end_of_video|>")
        assert tokens.input_ids.tolist() == hf(expanded, add_special_tokens=False)["input_ids"]

        last_user = max(number for number, turn in enumerate(messages) if turn["role"] == "user")
        expected = ""
        for number, turn in enumerate(messages):
            if turn["role"] == "assistant" and (number > last_user or not record["thinking"]):
                prompt = rendered(messages[:number], record, form, hf, prompt=True)
                answer = rendered(messages[: number + 1], record, form, hf).removeprefix(prompt)
                assert not answer.startswith("[gMASK]")
                expected += answer + ("<|observation|>" if turn.get("tool_calls") else "<|user|>")
                calls += len(turn.get("tool_calls", ()))
        assert as_text(sample, learned=True) == expected
        learned = [
            number for number, learn in zip(tokens.input_ids.tolist(), tokens.loss.tolist(), strict=True) if learn
        ]
        assert hf.decode(learned) == expected
    assert calls > count


@pytest.mark.fast
def test_a_call_is_learned_with_the_token_that_ends_it() -> None:
    sample = chat(ASK, CALL, RESPONSE, ANSWER, tools=[ZOOM])
    call = "<tool_call>zoom\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n<arg_key>on</arg_key>\n"
    call += "<arg_value>cat</arg_value>\n</tool_call><|observation|>"
    assert as_text(sample, learned=True) == f"{call}A<|user|>"
    assert as_text(chat(ASK, CALL, RESPONSE, CALL), learned=True) == call * 2
    masked = chat(ASK, {**CALL, "loss": False}, RESPONSE, ANSWER)
    assert as_text(masked, learned=True) == "A<|user|>"


@pytest.mark.fast
def test_only_responses_of_text_alone_end_with_a_line_break_in_glm46v() -> None:
    plain, shown = (as_text(chat(ASK, CALL, {**RESPONSE, "content": content}, ANSWER)) for content in ("4", "<image>4"))
    assert "\n<tool_response>\n4\n</tool_response>\n<|assistant|>" in plain
    assert f"\n<tool_response>\n{IMAGE}4\n</tool_response><|assistant|>" in shown
    assert "</tool_response><|assistant|>" in as_text(chat(ASK, CALL, RESPONSE, ANSWER, form="glm45v"))


@pytest.mark.fast
@pytest.mark.parametrize("form", FORMS)
def test_text_that_looks_like_tokens_stays_text_in_tools_calls_and_responses(
    form: str, tokenizer: GlmTokenizer
) -> None:
    hostile = "".join(name for name in tokenizer.special if name not in ("<image>", "<video>"))
    tool = {"type": "function", "function": {"name": hostile, "description": hostile}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": hostile, "arguments": {hostile: hostile, "k": [hostile]}}],
    }
    messages = [ASK, call, {"role": "tool", "content": hostile}, ANSWER]
    ids = tokenize(chat(*messages, form=form, tools=[tool], thinking=False), tokenizer).input_ids.tolist()
    harmless: Any = json.loads(json.dumps([messages, tool]).replace(json.dumps(hostile)[1:-1], "x"))
    names = [tokenizer.names[token] for token in ids if token in tokenizer.names]
    other = tokenize(chat(*harmless[0], form=form, tools=[harmless[1]], thinking=False), tokenizer).input_ids.tolist()
    assert names == [tokenizer.names[token] for token in other if token in tokenizer.names]
    assert names.count("<tool_call>") == 2  # in the explanation of the format, and the call


@pytest.mark.fast
@pytest.mark.parametrize(
    ("messages", "fields", "form", "reason"),
    [
        ([ASK, CALL, RESPONSE, ANSWER], {}, "glm41v", "unsupported_tool_call: the chat form glm41v has no tools"),
        ([ASK, ANSWER], {"tools": [ZOOM]}, "glm41v", "unsupported_tool_call"),
        ([ASK, CALL, {**RESPONSE, "content": "<image>"}, ANSWER], {}, "glm45v", "unsupported_tool_call: .*use glm46v"),
        ([ASK, RESPONSE, ANSWER], {}, "glm45v", "unmatched_tool_response: message 1 "),
        ([RESPONSE, ASK, ANSWER], {}, "glm45v", "unmatched_tool_response: message 0 "),
        ([ASK, CALL, ASK, ANSWER], {}, "glm45v", "unanswered_tool_call: message 1 "),
        ([{**ASK, "tool_calls": CALL["tool_calls"]}, ANSWER], {}, "glm45v", "bad_tool_call: message 0 "),
        ([ASK, {**CALL, "tool_calls": [{"name": " "}]}], {}, "glm45v", "bad_tool_call: message 1 .*without a name"),
        ([ASK, {**CALL, "tool_calls": 3}], {}, "glm45v", "bad_tool_call: message 1"),
        (
            [ASK, {**CALL, "tool_calls": [{"name": "a", "arguments": "[1"}]}],
            {},
            "glm45v",
            "bad_tool_call.*no JSON object",
        ),
        (
            [ASK, {**CALL, "tool_calls": [{"name": "a", "arguments": [1]}]}],
            {},
            "glm45v",
            "bad_tool_call.*no JSON object",
        ),
        ([ASK, ANSWER], {"tools": "zoom"}, "glm45v", "bad_tools: .*list of function schemas"),
        ([ASK, ANSWER], {"tools": [{"function": {}}]}, "glm45v", "bad_tools: tool 0 has no name"),
    ],
)
def test_what_a_form_cannot_express_has_a_reason(messages: Any, fields: Any, form: str, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        chat(*messages, form=form, **fields)


@pytest.mark.fast
def test_arguments_may_be_json_and_content_may_be_null() -> None:
    function = {"name": "zoom", "arguments": json.dumps(CALL["tool_calls"][0]["arguments"])}
    openai = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    given = {"domain": "chat", "messages": [ASK, openai, RESPONSE, ANSWER]}
    assert build_sample(given, images=0, videos=0) == chat(ASK, CALL, RESPONSE, ANSWER, form="glm45v")
    assert not re.search("None|null", as_text(build_sample(given, images=0, videos=0)))
