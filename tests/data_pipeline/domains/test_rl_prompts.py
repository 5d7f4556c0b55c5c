"""Prompts of the domain `rl`: what transformers renders with add_generation_prompt, without loss; and bad records."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.domains.rl_record import read_rl_record
from data_pipeline.encoding.tokenizer import tokenize
from data_pipeline.errors import BadSample
from data_pipeline.sample import Sample, Text, Token
from tests.data_pipeline.domains.test_chat import as_messages, random_turns
from tests.data_pipeline.domains.tool_chats import as_transformers, random_tool_chat
from tests.data_pipeline.sample_text import IMAGE_TEXT, as_text

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def hf(tokenizer_folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def record(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"domain": "rl", "messages": list(turns), "reference": "7", "verifier": "counting", **fields}


def prompt(written: dict[str, Any], form: str = "glm45v") -> Sample:
    content = json.dumps(written["messages"])
    return build_sample(written, images=content.count("<image>"), videos=content.count("<video>"), chat_form=form)


ASK = {"role": "user", "content": "<image>How many dots?"}


@pytest.mark.parametrize(
    ("form", "thinking", "end"),
    [
        ("glm45v", None, "<|assistant|>\n"),
        ("glm45v", True, "<|assistant|>\n"),
        ("glm45v", False, "/nothink<|assistant|>\n<think></think>\n"),
        ("glm46v", False, "/nothink<|assistant|>\n<think></think>\n"),
        ("glm41v", None, "<|assistant|>\n"),
    ],
)
def test_prompt_ends_where_the_assistant_begins(form, thinking, end):
    sample = prompt(record(ASK, thinking=thinking), form)
    assert as_text(sample) == f"[gMASK]<sop><|user|>\n{IMAGE_TEXT}How many dots?{end}"
    assert sample.domain == "rl"


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
def test_token_ids_equal_transformers_generation_prompt(form, hf, tokenizer):
    """Prompts of one and several turns; the templates themselves are compared with published ones in test_chat."""
    rng = np.random.default_rng(11)
    for _ in range(200):
        thinking = bool(rng.integers(2)) or form == "glm41v"
        turns = [
            {key: value.replace("<video>", "") for key, value in turn.items()} for turn in random_turns(rng, thinking)
        ][:-1]
        sample = prompt(record(*turns, thinking=thinking or None if form == "glm41v" else thinking), form)
        tokens = tokenize(sample, tokenizer, [(2, 2)] * as_text(sample).count(IMAGE_TEXT))
        rendered = hf.apply_chat_template(
            as_messages(turns),
            chat_template=CHAT_TEMPLATES[form],
            enable_thinking=thinking,
            add_generation_prompt=True,
            tokenize=False,
        )
        assert tokens.input_ids.tolist() == hf(rendered, add_special_tokens=False)["input_ids"]
        assert not tokens.loss.any()


@pytest.mark.parametrize("form", ["glm45v", "glm46v"])
def test_prompt_with_tools_equals_transformers_generation_prompt(form):
    for seed in range(20):
        chat = random_tool_chat(random.Random(seed), form)
        last = max(number for number, turn in enumerate(chat["messages"]) if turn["role"] == "user")
        turns = chat["messages"][: last + 1]
        sample = prompt(record(*turns, thinking=chat["thinking"], tools=chat.get("tools")), form)
        [rendered], _ = render_jinja_template(
            conversations=[as_transformers(turns)],
            tools=chat.get("tools"),
            chat_template=CHAT_TEMPLATES[form],
            enable_thinking=chat["thinking"],
            add_generation_prompt=True,
        )
        assert as_text(sample) == rendered
        assert not any(element.loss for element in sample.elements if isinstance(element, Text | Token))


@pytest.mark.parametrize(
    ("changed", "reason", "says"),
    [
        ({"messages": []}, "bad_record", 'non-empty list "messages"'),
        ({"messages": [ASK, {"role": "assistant", "content": "7"}]}, "bad_record", "a prompt ends with a user's"),
        ({"messages": [ASK], "thinking": "no"}, "bad_record", "it must be true or false"),
        ({"verifier": None}, "no_verifier", "the name of a verifier"),
        ({"verifier": 3}, "no_verifier", "the name of a verifier"),
        ({"reference": None}, "bad_reference", "it has none"),
        ({"reference": 7}, "bad_reference", "it is '7'"),
        ({"reference": "<answer>7</answer>"}, "bad_reference", "holds <answer>: write the answer alone"),
        ({"reference": " \n"}, "bad_reference", "no answer would be right"),
        ({"messages": [ASK, {"role": "user", "content": " "}]}, "bad_record", "a prompt asks something"),
        ({"messages": [{"role": "user", "content": "<image>Why?/nothink"}]}, "bad_record", "ends with /nothink"),
        ({"settings": [1]}, "bad_record", '"settings"'),
        ({"category": 3}, "bad_record", "\"category\" is '3'"),
        ({"tier": "Hard"}, "unknown_tier", "did you mean hard"),
        ({"tier": 3}, "unknown_tier", "very_hard, hard, medium, easy, very_easy"),
        ({"settings": {"options": ["dots", "lines"]}}, "options_not_asked", "'lines' is not in the question"),
        ({"settings": {"options": "dots"}}, "bad_record", '"options" must be a list'),
    ],
)
def test_bad_prompts_have_a_reason(changed, reason, says):
    with pytest.raises(BadSample, match=says) as caught:
        build_sample({**record(ASK), **changed}, images=1, videos=0)
    assert caught.value.reason == reason


def test_glm41v_has_no_prompt_without_thinking():
    with pytest.raises(BadSample, match="no form for chats without thinking") as caught:
        prompt(record(ASK, thinking=False), "glm41v")
    assert caught.value.reason == "chat_form"


def test_record_says_how_answers_are_scored():
    options = {"A": "3 dots", "B": "7 dots"}
    ask = {"role": "user", "content": "<image>How many? A. 3 dots B. 7 dots"}
    settings = {"words": True, "options": options}
    read = read_rl_record(record(ASK, ask, settings=settings, data_source="dots", tier="hard"))
    assert (read.question, read.reference, read.verifier) == ("How many? A. 3 dots B. 7 dots", "7", "counting")
    assert (read.settings, read.source, read.category, read.tier) == (settings, "dots", "", "hard")
    assert read.thinks
    assert not read_rl_record(record(ASK, thinking=False)).thinks
