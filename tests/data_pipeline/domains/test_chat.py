"""Chats: the published forms, the equivalent chat template, and loss only on the assistant's text."""

from __future__ import annotations

import re
from contextlib import nullcontext

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.encoding.tokenizer import tokenize
from data_pipeline.errors import BadSample
from data_pipeline.sample import Sample, Text, Token
from tests.data_pipeline.sample_text import IMAGE_TEXT, VIDEO_TEXT, as_text

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def hf(tokenizer_folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def chat(*turns: tuple[str, ...], thinking: bool | None = None, form: str = "glm45v") -> Sample:
    """Build a chat of turns (role, content) or ("assistant", content, reasoning)."""
    messages = [
        {"role": role, "content": content, **({"reasoning_content": rest[0]} if rest else {})}
        for role, content, *rest in turns
    ]
    record = {"domain": "chat", "messages": messages, "thinking": thinking}
    media = "".join(message["content"] for message in messages)
    return build_sample(record, images=media.count("<image>"), videos=media.count("<video>"), chat_form=form)


def learned(sample: Sample) -> str:
    """Return the text that carries loss, with | for the elements between."""
    text = ""
    for element in sample.elements:
        if isinstance(element, Text | Token) and element.loss:
            text += element.text if isinstance(element, Text) else element.name
        elif text and text[-1] != "|":
            text += "|"
    return text


def as_messages(turns: list[dict[str, str]]) -> list[dict]:
    """Return a chat as a user of transformers writes it: content as a list of text, image and video parts."""
    kinds = {"<image>": {"type": "image"}, "<video>": {"type": "video"}}
    messages = []
    for turn in turns:
        parts = [part for part in re.split("(<image>|<video>)", turn["content"]) if part]
        messages.append({**turn, "content": [kinds.get(part, {"type": "text", "text": part}) for part in parts]})
    return messages


def test_glm45v_chat_with_thinking():
    sample = chat(("user", "<image>Describe."), ("assistant", "A cat.", "Fur."))
    assert as_text(sample) == (
        f"[gMASK]<sop><|user|>\n{IMAGE_TEXT}Describe.<|assistant|>\n<think>Fur.</think>\nA cat.<|user|>"
    )
    assert learned(sample) == "<think>Fur.</think>\nA cat.<|user|>"


def test_glm45v_chat_without_thinking():
    sample = chat(("user", "<image>Describe."), ("assistant", "A cat."), thinking=False)
    assert as_text(sample) == (
        f"[gMASK]<sop><|user|>\n{IMAGE_TEXT}Describe./nothink<|assistant|>\n<think></think>\nA cat.<|user|>"
    )
    assert learned(sample) == "A cat.<|user|>"


def test_glm45v_multi_turn_keeps_only_reasoning_after_the_last_user_message():
    turns = [("system", "SYS"), ("user", "Q1"), ("assistant", "A1", "T1"), ("user", "<video>Q2")]
    sample = chat(*turns, ("assistant", "A2", "T2"), thinking=True)
    assert as_text(sample) == (
        "[gMASK]<sop><|system|>\nSYS<|user|>\nQ1<|assistant|>\n<think></think>\nA1"
        f"<|user|>\n{VIDEO_TEXT}Q2<|assistant|>\n<think>T2</think>\nA2<|user|>"
    )
    assert learned(sample) == "<think>T2</think>\nA2<|user|>"


def test_glm45v_multi_turn_without_thinking_learns_every_answer_and_its_end_token():
    sample = chat(("user", "Q1"), ("assistant", "A1", "T1"), ("user", "Q2"), ("assistant", "A2"), thinking=False)
    assert as_text(sample) == (
        "[gMASK]<sop><|user|>\nQ1/nothink<|assistant|>\n<think></think>\nA1"
        "<|user|>\nQ2/nothink<|assistant|>\n<think></think>\nA2<|user|>"
    )
    assert learned(sample) == "A1<|user|>|A2<|user|>"


def test_glm41v_chat_keeps_turns_unchanged():
    sample = chat(
        ("system", "SYS"),
        ("user", "Q1"),
        ("assistant", "<think>T1</think>\nA1"),
        ("user", "Q2"),
        ("assistant", "A2", "T2"),
        form="glm41v",
    )
    assert as_text(sample) == (
        "[gMASK]<sop><|system|>\nSYS<|user|>\nQ1<|assistant|>\n<think>T1</think>\nA1"
        "<|user|>\nQ2<|assistant|>\n<think>T2</think>\nA2<|user|>"
    )
    assert learned(sample) == "<think>T1</think>\nA1<|user|>|<think>T2</think>\nA2<|user|>"


def test_reasoning_inside_the_content_equals_reasoning_content():
    inline = chat(("user", "Q"), ("assistant", "<think>\nT\n</think>\n\nA\n"))
    apart = chat(("user", "Q"), ("assistant", "A", "T"))
    assert inline.elements == apart.elements


def random_turns(rng: np.random.Generator, thinking: bool) -> list[dict[str, str]]:
    words = ["What is it?", "<image>", "two\nlines", " spaces ", "<video>", "12", "图", "[[1,2,3,4]]", "<b>"]

    def text() -> str:
        return " ".join(words[index] for index in rng.integers(0, len(words), rng.integers(1, 5))) + "x"

    turns = [{"role": "system", "content": text()}] if rng.integers(2) else []
    for _ in range(rng.integers(1, 4)):
        turns.append({"role": "user", "content": text() + ["", "/nothink"][int(rng.integers(8) == 0 and not thinking)]})
        answer = {"role": "assistant", "content": text()}
        if thinking or rng.integers(2):
            reasoning = text().replace("<image>", "").replace("<video>", "")
            if rng.integers(2):
                answer["reasoning_content"] = reasoning
            else:
                answer["content"] = f"<think>{reasoning}</think>\n{answer['content']}"
        turns.append(answer)
    return turns


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
def test_chat_template_renders_the_same_text_as_build_sample(form, hf):
    rng = np.random.default_rng(7)
    for _ in range(300):
        thinking = bool(rng.integers(2)) or form == "glm41v"
        turns = random_turns(rng, thinking)
        sample = chat(*(tuple(turn.values()) for turn in turns), thinking=thinking, form=form)
        rendered = as_text(sample).removesuffix("<|user|>")
        options = {"tokenize": False, "chat_template": CHAT_TEMPLATES[form], "enable_thinking": thinking}
        assert hf.apply_chat_template(as_messages(turns), **options) == rendered
        if form == "glm45v":  # the tokenizer folder carries this form's template
            assert hf.apply_chat_template(as_messages(turns), tokenize=False, enable_thinking=thinking) == rendered


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
def test_loss_begins_at_the_end_of_the_generation_prompt(form, hf, tokenizer):
    """The ids that the model reads at inference are exactly those before the last answer's first loss token."""
    rng = np.random.default_rng(8)
    image_ids = [tokenizer.special[f"<|{name}|>"] for name in ("begin_of_image", "image", "end_of_image")]
    for _ in range(300):
        thinking = bool(rng.integers(2)) or form == "glm41v"
        turns = [
            {key: value.replace("<video>", "") for key, value in turn.items()} for turn in random_turns(rng, thinking)
        ]
        sample = chat(*(tuple(turn.values()) for turn in turns), thinking=thinking, form=form)
        images = as_text(sample).count(IMAGE_TEXT)
        tokens = tokenize(sample, tokenizer, [(2, 2)] * images)
        prompt = hf.apply_chat_template(
            as_messages(turns[:-1]),
            chat_template=CHAT_TEMPLATES[form],
            enable_thinking=thinking,
            add_generation_prompt=True,
            tokenize=False,
        )
        prompt_ids = hf(prompt, add_special_tokens=False)["input_ids"]
        assert tokens.input_ids[: len(prompt_ids)].tolist() == prompt_ids
        answer = tokens.loss[len(prompt_ids) :]
        assert not tokens.loss[len(prompt_ids) - 1]
        answer_ids = tokens.input_ids[len(prompt_ids) :]
        assert (answer | np.isin(answer_ids, image_ids)).all()
        if thinking and form == "glm45v":
            assert not tokens.loss[: len(prompt_ids)].any()
        assert tokens.input_ids[-1] == tokenizer.special["<|user|>"]


@pytest.mark.parametrize(
    ("messages", "thinking", "reason", "says"),
    [
        (None, None, "bad_record", 'non-empty list "messages"'),
        ([], None, "bad_record", 'non-empty list "messages"'),
        ([{"role": "robot", "content": "x"}], None, "bad_record", "needs a role"),
        ([{"role": "user", "content": 3}], None, "bad_record", r"\(user\): content must be a string"),
        ([{"role": "user", "content": "Q", "reasoning_content": 3}], None, "bad_record", ": reasoning_content must be"),
        ([{"role": "assistant", "content": "A"}], "false", "bad_record", "is 'false': it must be true or false"),
        ([{"role": "user", "content": "Q"}], None, "bad_record", "ends with an answer"),
        ([{"role": "assistant", "content": "A"}] * 2, None, "bad_record", "join them"),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": " "}], False, "empty_answer", "no answer"),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], True, "missing_reasoning", "false"),
        ([{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A"}], False, "media_mismatch", "1"),
    ],
)
def test_bad_chats_have_a_reason(messages, thinking, reason, says):
    with pytest.raises(BadSample, match=says) as caught:
        build_sample({"domain": "chat", "messages": messages, "thinking": thinking}, images=0, videos=0)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"weight": 0}, "unsupported_weight"),
        ({"function_call": {"name": "zoom"}}, "unsupported_tool_call"),
        ({"reasoning": "T"}, "bad_record"),
        ({"weight": 1, "tool_calls": None, "reasoning": "", "name": "x"}, None),
    ],
)
def test_field_that_would_change_the_meaning_of_an_answer_is_not_ignored(field, reason):
    messages = [{"role": "user", "content": "Q", "weight": 0}, {"role": "assistant", "content": "A", **field}]
    expected = pytest.raises(BadSample, match=f"{reason}: message 1 has") if reason else nullcontext()
    with expected:
        build_sample({"domain": "chat", "messages": messages}, images=0, videos=0)


def test_glm41v_chat_without_thinking_is_rejected():
    with pytest.raises(BadSample, match="chat_form"):
        chat(("user", "Q"), ("assistant", "A"), thinking=False, form="glm41v")
