"""Chats with keys renamed, added, removed and with other values: rejected or read, and every message accounted for."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from data_pipeline.domains import build_sample
from data_pipeline.errors import BadSample
from data_pipeline.sharding.fields import MESSAGE_FIELDS, unused_message_keys
from tests.data_pipeline.inputs.reading import opened, read
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

ASK, ANSWER = {"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "<think>T</think>A"}
IMAGE = {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "high"}}
BASES: list[dict[str, Any]] = [
    {"messages": [ASK, {**ANSWER, "loss": True}], "images": ["a.jpg"]},
    {
        "domain": "chat",
        "messages": [ASK, {**ANSWER, "loss": False}, {**ASK, "content": "Q"}, ANSWER],
        "images": ["a.jpg"],
    },
    {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        "image": "a.jpg",
        "system": "S",
    },
    {"query": "<image>Q", "response": "A", "history": [["Q", "A"]], "images": ["a.jpg"]},
    {"instruction": "Q", "input": "", "output": "A", "history": [["Q", "A"]]},
    {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Q"}]}, ANSWER]},
    {
        "messages": [{**ASK, "content": "<image><ref-object>"}, {**ANSWER, "content": "<bbox>"}],
        "images": ["a.jpg"],
        "objects": {"ref": ["x"], "bbox": [[1, 2, 30, 40]]},
    },
    {"messages": json.dumps([{**ASK, "content": "<ImageHere>"}, ANSWER]), "images": ["a.jpg"], "loss": [0, 1]},
]
NAMES = (
    *("role", "content", "value", "loss", "weight", "mask", "label", "text", "type", "images", "image", "tools", "x"),
    *("reasoning_content", "thinking", "messages", "conversations", "system", "objects", "index", "domain", "bbox"),
)
VALUES: tuple[Any, ...] = (
    None,
    0,
    1,
    0.5,
    True,
    False,
    "",
    "x",
    "<image>",
    "<think>",
    [],
    {},
    ["x"],
    {"x": 1},
    [[1, 2]],
    "[]",
    "chat",
)


def nodes(value: Any) -> list[Any]:
    """Return all dicts and lists in a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) and value else []
    return own + [node for entry in inner for node in nodes(entry)]


def mutate(record: dict[str, Any], rng: random.Random) -> None:
    node = rng.choice(nodes(record) or [record])
    key = rng.choice(list(node)) if isinstance(node, dict) and node else rng.randrange(len(node)) if node else "x"
    match rng.randrange(4), node:
        case 0, dict():
            node[rng.choice(NAMES)] = node.pop(key, None)
        case 1, dict():
            node[rng.choice(NAMES)] = rng.choice(VALUES)
        case 2, _ if node:
            del node[key]
        case _:
            node[key] = rng.choice(VALUES)


def test_mutated_chats_are_read_or_rejected_and_accounted_for(tmp_path):
    rng = random.Random(3)
    (tmp_path / "a.jpg").write_bytes(encoded(pattern(168, 300)))
    records = []
    for number in range(2000):
        record = json.loads(json.dumps(BASES[number % len(BASES)]))
        for _ in range(rng.randrange(1, 4)):
            mutate(record, rng)
        records.append(record)
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    drafts, rejections = read(opened(tmp_path / "x.jsonl"))
    assert len(drafts) + len(rejections) == len(records)
    built = 0
    for draft in drafts:
        try:
            sample = build_sample(draft.record, images=len(draft.images), videos=len(draft.videos))
        except BadSample:
            continue
        built += 1
        unread = unused_message_keys(draft.record)
        if sample.domain == "chat":
            keys = {key for turn in draft.record["messages"] for key in turn}
            assert keys - MESSAGE_FIELDS == {name.removeprefix("message key ") for name in unread}
    assert built > 300


def test_messages_of_other_domains_are_fields_like_others():
    assert not unused_message_keys({"domain": "text", "text": "x", "messages": ["x"]})
