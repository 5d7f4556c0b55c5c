"""Conversations in the formats of other tools: their token ids equal those of transformers' chat template."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.inputs.records.chat_formats import is_foreign_chat, normalise
from data_pipeline.inputs.references import decode_data_uri

pytestmark = pytest.mark.fast

URI = f"data:image/png;base64,{base64.b64encode(b'an image').decode()}"
IMAGE = {"type": "image"}

# (record as another tool writes it, the same chat for transformers' template, files in order)
CHATS = [
    pytest.param(
        {
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
            "image": "cat.jpg",
            "id": "llava-1",
        },
        [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "\nWhat is it?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        ["cat.jpg"],
        id="llava",
    ),
    pytest.param(
        {
            "conversations": [{"from": "human", "value": "Compare them."}, {"from": "gpt", "value": "Both are cats."}],
            "system": "Be brief.",
            "images": ["a.jpg", "b.jpg"],
            "tools": "[]",
        },
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Compare them."}]},
            {"role": "assistant", "content": "Both are cats."},
        ],
        ["a.jpg", "b.jpg"],
        id="sharegpt-without-placeholders",
    ),
    pytest.param(
        {
            "messages": [
                {"role": "user", "content": "<image>Who are they?"},
                {"role": "assistant", "content": "<think>Two players.</think>\nKane and Goretzka."},
            ],
            "images": ["players.jpg"],
        },
        [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "Who are they?"}]},
            {"role": "assistant", "content": "Kane and Goretzka.", "reasoning_content": "Two players."},
        ],
        ["players.jpg"],
        id="llama-factory-thinking",
    ),
    pytest.param(
        {
            "instruction": "Translate.",
            "input": "Katze",
            "output": "cat",
            "system": "You translate.",
            "history": [["Hund", "dog"]],
        },
        [
            {"role": "system", "content": "You translate."},
            {"role": "user", "content": "Hund"},
            {"role": "assistant", "content": "dog"},
            {"role": "user", "content": "Translate.\nKatze"},
            {"role": "assistant", "content": "cat"},
        ],
        [],
        id="alpaca",
    ),
    pytest.param(
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Look closely."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Is <image> a tag? "},
                        {"type": "image_url", "image_url": {"url": "my%20cat.jpg"}},
                        {"type": "image_url", "image_url": {"url": URI, "detail": "high"}},
                        {"type": "text", "text": "And these?"},
                    ],
                },
                {"role": "assistant", "content": "Cats.", "reasoning_content": "Whiskers.", "tool_calls": []},
            ]
        },
        [
            {"role": "system", "content": "Look closely."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Is < image > a tag? "},
                    IMAGE,
                    IMAGE,
                    {"type": "text", "text": "And these?"},
                ],
            },
            {"role": "assistant", "content": "Cats.", "reasoning_content": "Whiskers."},
        ],
        ["my%20cat.jpg", URI],
        id="openai",
    ),
    pytest.param(
        {
            "messages": [
                {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "A cat."},
            ],
            "images": ["cat.jpg"],
            "thinking": False,
        },
        [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
        ["cat.jpg"],
        id="trl",
    ),
]


@pytest.fixture(scope="module")
def hf(tokenizer_folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize("form", CHAT_TEMPLATES)
@pytest.mark.parametrize(("record", "messages", "files"), CHATS)
def test_token_ids_equal_transformers_template(record, messages, files, form, hf, tokenizer: GlmTokenizer):
    if form == "glm41v":  # this template has no form without thinking
        record = {key: value for key, value in record.items() if key != "thinking"}
    assert is_foreign_chat(record)
    normalised = normalise(json.loads(json.dumps(record)))
    assert normalised.get("images", []) == files
    assert not is_foreign_chat(normalised)
    assert normalise(normalised) == normalised  # a normalised record stays unchanged

    sample = build_sample(normalised, images=len(files), videos=0, chat_form=form)
    ids = tokenize(sample, tokenizer, [(2, 2)] * len(files)).input_ids.tolist()  # an image of one token
    thinking = any("reasoning_content" in turn for turn in messages)
    options = {"chat_template": CHAT_TEMPLATES[form], "enable_thinking": thinking, "tokenize": False}
    if form == "glm41v" and isinstance(record.get("messages"), list) and "<think>" in str(record):
        messages = messages_as_written(record)  # this template keeps reasoning as it was written
    rendered = hf.apply_chat_template(messages, **options)
    assert ids == hf(rendered + "<|user|>", add_special_tokens=False)["input_ids"]


def messages_as_written(record: dict[str, Any]) -> list[dict[str, Any]]:
    question, answer = record["messages"]
    text = question["content"].removeprefix("<image>")
    return [{"role": "user", "content": [IMAGE, {"type": "text", "text": text}]}, answer]


def test_videos_are_matched_with_placeholders_like_images():
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "file:///a%20b.mp4"}}, "What?"]},
            {"role": "assistant", "content": "A dog runs."},
        ],
        "source": "web",
    }
    assert normalise(record) == {
        "domain": "chat",
        "messages": [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A dog runs."}],
        "videos": ["/a b.mp4"],
        "source": "web",
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_under_each_of_its_names(name):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Cats.", name: "Whiskers."}]
    assert normalise({"messages": turns})["messages"][1]["reasoning_content"] == "Whiskers."


def test_only_foreign_conversations_are_converted():
    own = {"domain": "chat", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert not is_foreign_chat(own)
    assert not is_foreign_chat({"domain": "image_text", "text": "x"})
    assert not is_foreign_chat({"domain": "text", "text": "x", "conversations": []})
    assert not is_foreign_chat({"instruction": "x"})
    assert is_foreign_chat({"messages": own["messages"]})
    assert is_foreign_chat({"domain": "chat", "messages": [{"role": "user", "content": [{"type": "text"}]}]})


ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}, ASK, ANSWER]}, "unsupported_weight"),
        ({"messages": [ASK, ANSWER], "audios": ["a.wav"]}, "unsupported_audio"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]}, "unsupported_content"),
        ({"conversations": [{"from": "human", "value": "Q"}], "chosen": {}, "rejected": {}}, "preference_pair"),
        ({"conversations": [{"from": "narrator", "value": "Q"}]}, "unknown_role"),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "unknown_role"),
        ({"conversations": []}, "bad_record"),
        ({"conversations": "Q"}, "bad_record"),
        ({"conversations": ["Q"]}, "bad_record"),
        ({"messages": [{"role": "user", "content": 3}]}, "bad_record"),
        ({"instruction": "x", "output": ["a", "b"]}, "preference_pair"),
        ({"instruction": "x", "output": 3}, "bad_record"),
        ({"instruction": 3, "output": "y"}, "bad_record"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "bad_record"),
        ({"messages": [ASK, ANSWER], "images": [3]}, "bad_record"),
        ({"messages": [ASK, ANSWER], "images": ["https://example.org/a.jpg"]}, "remote_file"),
        ({"messages": [{"role": "user", "content": "<image>Q"}, ANSWER]}, "media_mismatch"),
        (
            {"messages": [{"role": "user", "content": "<image>Q"}, ANSWER], "images": ["a.jpg", "b.jpg"]},
            "media_mismatch",
        ),
        ({"messages": [ANSWER], "images": ["a.jpg"]}, "media_mismatch"),
        (
            {"messages": [{"role": "user", "content": [IMAGE, {"type": "image", "image": "a.jpg"}]}, ANSWER]},
            "media_mismatch",
        ),
    ],
)
def test_unsupported_conversation_is_rejected(record, reason):
    assert is_foreign_chat(record) or "audios" in record
    with pytest.raises(BadSample) as caught:
        normalise(record)
    assert caught.value.reason == reason


def test_data_uri_is_decoded():
    assert decode_data_uri(URI) == b"an image"
    assert decode_data_uri("data:,a%20b") == b"a b"
