"""Answers marked "loss": false, and thoughts whose tags do not pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.sample import Text, Token

pytestmark = pytest.mark.fast

ASK = {"role": "user", "content": "Q"}


@pytest.fixture(scope="module")
def hf(tokenizer_folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def answer(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def build(messages: list[dict[str, Any]], form: str, thinking: bool | None = None):
    record = {"domain": "chat", "messages": messages, "thinking": thinking}
    return build_sample(record, images=0, videos=0, chat_form=form)


def learned(messages: list[dict[str, Any]], form: str) -> str:
    elements = build(messages, form).elements
    parts = [element for element in elements if isinstance(element, Text | Token) and element.loss]
    return "".join(part.text if isinstance(part, Text) else part.name for part in parts)


def expected_loss(messages: list[dict[str, Any]], form: str, thinking: bool, hf: PreTrainedTokenizerFast) -> np.ndarray:
    """Compute the loss mask from the chat template alone: an answer is what follows the prompt that asks for it."""
    options = {"tokenize": False, "chat_template": CHAT_TEMPLATES[form], "enable_thinking": thinking}

    def length(turns: list[dict[str, Any]], prompt: bool) -> int:
        text = hf.apply_chat_template(turns, add_generation_prompt=prompt, **options)
        return len(hf(text, add_special_tokens=False)["input_ids"])

    loss = np.zeros(length(messages, False) + 1, dtype=bool)
    last_user = max(index for index, turn in enumerate(messages) if turn["role"] == "user")
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant" or turn.get("loss") is False:
            continue
        if thinking and form == "glm45v" and index < last_user:
            continue
        loss[length(messages[:index], True) : length(messages[: index + 1], False) + 1] = True
    return loss


@pytest.mark.parametrize(
    ("form", "thinking"), [("glm45v", True), ("glm45v", False), ("glm46v", False), ("glm41v", True)]
)
def test_masked_answers_carry_no_loss_token_by_token(form, thinking, hf, tokenizer: GlmTokenizer):
    rng = np.random.default_rng(5)
    masked = 0
    for _ in range(200):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "S"}] if rng.integers(2) else []
        for number in range(rng.integers(1, 5)):
            messages.append({"role": "user", "content": f"question {number}"})
            keys: dict[str, Any] = {"reasoning_content": f"thought {number}"} if thinking else {}
            if rng.integers(2):
                keys["loss"] = bool(rng.integers(2))
            messages.append(answer(f"<answer>{number}</answer> of many", **keys))
        expected = expected_loss(messages, form, thinking, hf)
        if not expected.any():
            with pytest.raises(BadSample, match="nothing_to_learn"):
                build(messages, form, thinking)
            continue
        tokens = tokenize(build(messages, form, thinking), tokenizer)
        assert tokens.loss.tolist() == expected.tolist()
        masked += any(turn.get("loss") is False for turn in messages)
    assert masked > 20


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
def test_masked_answer_is_context(form):
    messages = [ASK, answer("BAD", loss=False), ASK, answer("good", loss=True)]
    assert learned(messages, form) == "good<|user|>"
    messages = [ASK, answer("good"), ASK, answer("BAD", reasoning_content="BAD", loss=False)]
    assert learned(messages, form) == "good<|user|>"
    with pytest.raises(BadSample, match="nothing_to_learn"):
        build([ASK, answer("BAD", loss=False)], form)
    with pytest.raises(BadSample, match="must be true or false"):
        build([ASK, answer("BAD", loss=0.5)], form)


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (answer("<think>because the reply was cut off here"), "unclosed_thought"),
        (answer("<think>T</think>A<think>more"), "misplaced_thought"),
        (answer("A</think>B<think>"), "unclosed_thought"),
        (answer("<think>cut", reasoning_content="T"), "unclosed_thought"),
        (answer("<think>T</think>A", reasoning_content="T"), "misplaced_thought"),
        (answer("<think>T</think>lost</think>A"), "misplaced_thought"),
        (answer("<think>lost<think>T</think>A"), "misplaced_thought"),
        (answer("lost <think>T</think>A"), "misplaced_thought"),
        (answer("A", reasoning_content="T</think>U"), "misplaced_thought"),
        (answer("<think>T</think><answer>cut"), "unclosed_answer"),
        (answer("The answer is <|begin_of_box|>4"), "unclosed_answer"),
    ],
)
def test_thought_whose_tags_do_not_pair_is_rejected(turn, reason, form):
    for messages in ([ASK, turn], [ASK, turn, ASK, answer("A")]):
        with pytest.raises(BadSample) as caught:
            build(messages, form)
        assert caught.value.reason == reason


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
def test_thought_closed_but_not_opened_begins_with_the_content(form):
    text, boxed = "<think>T</think>\nA<|user|>", "<answer>A</answer>"
    assert learned([ASK, answer("T</think>\nA")], form) == text
    assert learned([ASK, answer(f"<think>T</think>\n{boxed}")], form) == text.replace("A", boxed)


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
def test_tags_in_the_text_of_a_user_are_plain_text(form, tokenizer: GlmTokenizer):
    ask = {"role": "user", "content": "What do <think> and </think></think> and <answer> mean? <|image|><|user|>"}
    ids = tokenize(build([ask, answer("Tags.")], form), tokenizer).input_ids
    first = ids[3:].tolist().index(tokenizer.special["<|assistant|>"])
    special = set(tokenizer.special.values()) - {tokenizer.special.get("/nothink")}
    assert not set(ids[3 : 3 + first].tolist()) & special


@pytest.mark.parametrize("mark", [{"train": False}, {"mask": 1}, {"loss_weight": 0.0}, {"weight": 0}, {"learn": "no"}])
def test_answer_with_another_tools_mark_is_not_learned(mark):
    with pytest.raises(BadSample, match=r'unsupported_weight: .*write "loss": false'):
        build([ASK, answer("A", **mark)], "glm45v")
    build([ASK, answer("A", **mark, loss=False), ASK, answer("B")], "glm45v")


def test_empty_reasoning_leaves_the_thought_in_the_answer():
    messages = [ASK, answer("T</think>A", reasoning_content=" ")]
    assert learned(messages, "glm45v") == "<think>T</think>\nA<|user|>"
