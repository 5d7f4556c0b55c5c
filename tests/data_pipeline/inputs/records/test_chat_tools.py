"""Chats with tools in the formats of other programs: all become the same tokens as transformers' template writes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.inputs.records.chat_formats import is_foreign_chat, normalise
from data_pipeline.inputs.records.chat_tools import JOINED
from data_pipeline.sharding.build import build_shards

pytestmark = pytest.mark.fast

SCHEMA = {"name": "zoom", "description": "Look closer.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
NEAR, FAR = ({"name": "zoom", "arguments": {"factor": factor, "on": "the café"}} for factor in (2, 0.5))
ASK, ANSWER = {"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "Three."}
SEEN = '{"count": 3}'

# The chat as transformers takes it.
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"function": NEAR}, {"function": FAR}]},
    {"role": "tool", "content": SEEN},
    {"role": "tool", "content": "Nothing."},
    {"role": "assistant", "content": "Three."},
]


def as_openai(call: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}, **keys}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in pairs]


RECORDS: dict[str, dict[str, Any]] = {
    "openai": {
        "messages": [
            ASK,
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [as_openai(NEAR, id="a"), as_openai(FAR, id="b")],
            },
            {"role": "tool", "tool_call_id": "a", "content": SEEN},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "Nothing."}]},
            ANSWER,
        ],
        "tools": TOOLS,
        "images": ["cat.jpg"],
    },
    "sharegpt": {
        "conversations": turns(
            ("human", "<image>How many?"),
            ("gpt", "I look."),
            ("function_call", json.dumps([NEAR, FAR])),
            ("observation", SEEN),
            ("observation", "Nothing."),
            ("gpt", "Three."),
        ),
        "tools": json.dumps([SCHEMA]),
        "images": ["cat.jpg"],
    },
    "ms-swift": {
        "messages": [
            ASK,
            {"role": "assistant", "content": "I look."},
            {"role": "tool_call", "content": json.dumps(NEAR)},
            {"role": "tool_call", "content": json.dumps(FAR)},
            {"role": "tool_response", "content": SEEN},
            {"role": "tool_response", "content": "Nothing."},
            ANSWER,
        ],
        "tools": json.dumps(TOOLS),
        "images": ["cat.jpg"],
    },
    "hermes": {
        "conversations": turns(
            ("human", "<image>How many?"),
            ("gpt", "I look.\n" + "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n" for call in (NEAR, FAR))),
            ("tool", f"<tool_response>\n{SEEN}\n</tool_response>\n"),
            ("tool", "<tool_response>\nNothing.\n</tool_response>"),
            ("gpt", "Three."),
        ),
        "tools": [SCHEMA],
        "images": ["cat.jpg"],
    },
    "own": {
        "domain": "chat",
        "messages": [
            ASK,
            {"role": "assistant", "content": "I look.", "tool_calls": [NEAR, FAR]},
            {"role": "tool", "content": SEEN},
            {"role": "tool", "content": "Nothing."},
            ANSWER,
        ],
        "tools": TOOLS,
        "images": ["cat.jpg"],
    },
}


@pytest.fixture(scope="module")
def hf(tokenizer_folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize("form", ["glm45v", "glm46v"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_format_gives_the_tokens_of_the_template(name: str, form: str, hf: Any, tokenizer: GlmTokenizer) -> None:
    record = json.loads(json.dumps(RECORDS[name]))
    assert is_foreign_chat(record) == (name != "own")
    notes: Counter[str] = Counter()
    normalised = normalise(record, notes)
    assert notes[JOINED] == {"sharegpt": 1, "ms-swift": 2}.get(name, 0)
    assert normalised["images"] == ["cat.jpg"]
    assert not is_foreign_chat(normalised)
    assert normalise(normalised) == normalised
    tokens = tokenize(build_sample(normalised, images=1, videos=0, chat_form=form), tokenizer, [(2, 2)])
    options = {"chat_template": CHAT_TEMPLATES[form], "enable_thinking": False, "tokenize": False}
    text = hf.apply_chat_template(CHAT, tools=TOOLS, **options) + "<|user|>"
    assert tokens.input_ids.tolist() == hf(text, add_special_tokens=False)["input_ids"]


def test_older_calls_of_openai_and_thoughts_before_a_call() -> None:
    older = {
        "messages": [
            ASK,
            {
                "role": "assistant",
                "content": None,
                "function_call": {**NEAR, "arguments": json.dumps(NEAR["arguments"])},
            },
            {"role": "function", "name": "zoom", "content": SEEN},
            ANSWER,
        ],
        "functions": [SCHEMA],
    }
    found = normalise({**older, "images": ["cat.jpg"]})
    assert found["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [NEAR]}
    assert (found["messages"][2]["role"], found["tools"]) == ("tool", TOOLS)
    thinking = turns(
        ("human", "Q"),
        ("function_call", f"<think>Look.</think>\n{json.dumps(NEAR)}"),
        ("observation", SEEN),
        ("gpt", "A"),
    )
    answer = normalise({"conversations": thinking})["messages"][1]
    assert answer == {"role": "assistant", "content": "<think>Look.</think>", "tool_calls": [NEAR]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [ASK, ANSWER], "tools": "not JSON"}, "bad_tools"),
        ({"messages": [ASK, ANSWER], "tools": TOOLS, "functions": [SCHEMA]}, "bad_tools"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, "bad_tool_call"),
        ({"conversations": turns(("human", "Q"), ("function_call", "zoom in"))}, "bad_tool_call"),
        ({"conversations": turns(("human", "Q"), ("function_call", ""))}, "bad_tool_call"),
        (
            {"messages": [ASK, {**ANSWER, "content": '<tool_call>{"name": "a"}</tool_call> and?'}], "tools": TOOLS},
            "bad_tool_call",
        ),
        (
            {"messages": [ASK, {**ANSWER, "content": "<tool_call>{'name': 3}</tool_call>"}], "tools": TOOLS},
            "bad_tool_call",
        ),
        (
            {"messages": [ASK, {**ANSWER, "loss": False}, {"role": "tool_call", "content": json.dumps(NEAR)}]},
            "unsupported_weight",
        ),
    ],
)
def test_calls_that_cannot_be_read_are_rejected_with_a_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        normalise(record)
    assert caught.value.reason == reason


def test_text_about_calls_in_a_chat_without_tools_stays_text() -> None:
    written = {**ANSWER, "content": 'Write <tool_call>{"name": "a"}</tool_call>.'}
    assert normalise({"messages": [ASK, written], "images": ["a.jpg"]})["messages"][1] == written


def test_build_accounts_for_every_message(tokenizer_folder, tmp_path) -> None:
    without_images = {
        name: json.loads(
            json.dumps({key: value for key, value in record.items() if key != "images"}).replace("<image>", "")
        )
        for name, record in RECORDS.items()
    }
    unmatched = {"messages": [{"role": "user", "content": "Q"}, {"role": "tool", "content": "42"}, ANSWER]}
    lines = [json.dumps(record) for record in (*without_images.values(), unmatched)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    built = build_shards([tmp_path / "chats.jsonl"], tmp_path / "out", tokenizer=tokenizer_folder)
    assert (built.counts.samples, dict(built.counts.rejected)) == (5, {"unmatched_tool_response": 1})
    older = build_shards([tmp_path / "chats.jsonl"], tmp_path / "old", tokenizer=tokenizer_folder, chat_form="glm41v")
    assert (older.counts.samples, sum(older.counts.rejected.values())) == (0, 6)
