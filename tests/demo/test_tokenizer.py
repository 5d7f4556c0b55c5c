"""The demo's tokenizer: ids of special tokens, lossless text, and chats as GLM-4.5V renders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from demo.tokenizer import SPECIAL_TOKENS, train_tokenizer

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_special_tokens_have_the_first_ids(tokenizer: Any) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(36))
    assert SPECIAL_TOKENS.index("<|image|>") == 34
    assert len(tokenizer) <= 2048


def test_decoding_returns_any_text(tokenizer: Any) -> None:
    text = "Grüße, 世界!\n\n  x = 12345\t# 😀 \x00\x7f"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    texts = ["a tabby cat sat", "on a wooden table"] * 20
    first, second = (train_tokenizer(texts, tmp_path / name, vocab_size=310) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 100 cannot hold 292"):
        train_tokenizer(["text"], tmp_path, vocab_size=100)


PROMPT = [{"type": "image"}, {"type": "text", "text": "Describe."}]
SEVERAL_TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "SYS"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1", "reasoning_content": "T1"},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Q2"}]},
    {"role": "assistant", "content": "A2", "reasoning_content": "T2"},
]
RENDERED = [  # as the published template of GLM-4.5V renders them
    (
        [{"role": "user", "content": PROMPT}],
        {"add_generation_prompt": True},
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>Describe.<|assistant|>\n",
    ),
    (
        [{"role": "user", "content": PROMPT}],
        {"add_generation_prompt": True, "enable_thinking": False},
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>Describe./nothink<|assistant|>\n"
        "<think></think>\n",
    ),
    (
        SEVERAL_TURNS,
        {},
        "[gMASK]<sop><|system|>\nSYS<|user|>\nQ1<|assistant|>\n<think></think>\nA1<|user|>\n"
        "<|begin_of_video|><|video|><|end_of_video|>Q2<|assistant|>\n<think>T2</think>\nA2",
    ),
]


@pytest.mark.parametrize(("messages", "options", "expected"), RENDERED)
def test_chat_renders_as_published(tokenizer: Any, messages: Any, options: dict[str, Any], expected: str) -> None:
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == expected
