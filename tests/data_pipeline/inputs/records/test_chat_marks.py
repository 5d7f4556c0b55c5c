"""Marks of other tools in chats: which answers are learned, and what stands for images, videos and boxes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.domains import build_sample
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.inputs.records.chat_formats import is_foreign_chat, normalise
from tests.data_pipeline.inputs.reading import opened, read
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def rejected(record: dict[str, Any]) -> tuple[str, str]:
    assert is_foreign_chat(record)
    with pytest.raises(BadSample) as caught:
        normalise(json.loads(json.dumps(record)))
    return caught.value.reason, caught.value.detail


def chat(question: str, answer: str = "A", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


@pytest.mark.parametrize("own", [{}, {"domain": "chat"}])
@pytest.mark.parametrize(
    "mark",
    [
        *({"loss": value} for value in (False, 0, 0.0, "false", "0")),
        *({"loss_weight": 0.0}, {"train": False}, {"training": False}, {"weight": 0}, {"mask": 1}, {"mask": True}),
        {"loss": False, "weight": 0},
    ],
)
def test_answer_marked_not_to_be_learned_is_masked(mark, own):
    record = {**own, "messages": [ASK, {**ANSWER, "content": "BAD", **mark}, ASK, ANSWER]}
    assert is_foreign_chat(record) or mark == {"loss": False}
    converted = normalise(record)
    assert converted["messages"] == [ASK, {**ANSWER, "content": "BAD", "loss": False}, ASK, ANSWER]
    assert normalise(converted) == converted
    assert not is_foreign_chat(converted)


@pytest.mark.parametrize("mark", [{"loss": True}, {"loss_weight": 1.0}, {"weight": 1}, {"mask": 0}, {"train": None}])
def test_answer_marked_to_be_learned_is_learned(mark):
    assert normalise({"messages": [ASK, {**ANSWER, **mark}]})["messages"] == [ASK, ANSWER]


def test_list_of_marks_in_the_record_is_obeyed():
    turns = [ASK, ANSWER, ASK, ANSWER]
    masked = [ASK, {**ANSWER, "loss": False}, ASK, ANSWER]
    for marks in ({"loss": [0, 1]}, {"loss_mask": [0, 0, 0, 1]}, {"train": [True, False, True, True]}):
        converted = normalise({"domain": "chat", "messages": turns, **marks})
        assert converted == {"domain": "chat", "messages": masked}
    assert rejected({"messages": turns, "loss": [1, 0, 1]})[0] == "unsupported_weight"
    assert normalise({"messages": turns, "masks": [[[1, 2]]]})["masks"] == [[[1, 2]]]  # of an image


@pytest.mark.parametrize(
    ("record", "reason", "says"),
    [
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "unsupported_weight", "weight"),
        ({"messages": [ASK, {**ANSWER, "loss_weight": 0.3}]}, "unsupported_weight", "loss_weight"),
        ({"messages": [ASK, {**ANSWER, "mask": "some"}]}, "unsupported_weight", "mask"),
        ({"messages": [ASK, {**ANSWER, "loss": True, "weight": 0}]}, "unsupported_weight", "contradict"),
        ({"messages": [ASK, {**ANSWER, "train_detail": [{"begin_offset": 0}]}]}, "unsupported_weight", "train_detail"),
        ({"messages": [ASK, ANSWER], "label": False}, "preference_data", "label"),
        ({"messages": [ASK, ANSWER], "kto_tag": False}, "preference_data", "kto_tag"),
        ({"messages": [ASK, ANSWER], "kto_tag": "false"}, "preference_data", "kto_tag"),
        ({"prompt": "Q", "completion": "A", "label": False}, "preference_data", "label"),
        ({"messages": [ASK, ANSWER], "train": False}, "nothing_to_learn", "train"),
        ({"messages": [ASK, ANSWER], "loss_weight": 0.0}, "nothing_to_learn", "loss_weight"),
        ({"messages": [ASK, ANSWER], "rejected_response": "B"}, "preference_pair", "rejected_response"),
        ({"chosen_messages": [ASK, ANSWER], "rejected_messages": [ASK, ANSWER]}, "preference_pair", "messages"),
        ({"messages": [ASK, ANSWER], "rejected_messages": [ASK, ANSWER]}, "preference_pair", "rejected_messages"),
        ({"input": {"messages": [ASK]}, "preferred_output": [ANSWER]}, "preference_pair", "preferred_output"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference_pair", "pair"),
        ({"messages": [ASK, ANSWER], "tools": [{"parameters": {}}]}, "bad_tools", "tool 0"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, "bad_tool_call", "message 1"),
    ],
)
def test_what_cannot_be_obeyed_is_rejected_by_name(record, reason, says):
    for own in ({}, {"domain": "chat"}) if "messages" in record else ({},):
        assert rejected({**own, **record})[0] == reason
        assert says in rejected({**own, **record})[1]


@pytest.mark.parametrize(
    ("text", "files", "expected", "order"),
    [
        ("<image1> or <image2>?", 2, "<image> or <image>?", [0, 1]),
        ("<image_2> or <image_1>?", 2, "<image> or <image>?", [1, 0]),
        ("<|image_1|>Q", 1, "<image>Q", [0]),
        ("<image_0> <image_1>", 2, "<image> <image>", [0, 1]),
        ("<ImageHere>Q<ImageHere>", 2, "<image>Q<image>", [0, 1]),
        ("<IMAGE>\nQ", 1, "<image>\nQ", [0]),
        ("<|image|>Q", 1, "<image>Q", [0]),
        ("<|begin_of_image|><|image|><|end_of_image|>Q", 1, "<image>Q", [0]),
        ("<|vision_start|><|image_pad|><|vision_end|>Q", 1, "<image>Q", [0]),
        ("<img><IMG_CONTEXT><IMG_CONTEXT></img>Q", 1, "<image>Q", [0]),
        ("<im_start><image><im_end>Q", 1, "<image>Q", [0]),
        ("(<image>./</image>)Q", 1, "<image>Q", [0]),
        ("<|media_start|>image<|media_content|><|media_pad|><|media_end|>Q", 1, "<image>Q", [0]),
        ("[IMG]Q<image_soft_token>", 2, "<image>Q<image>", [0, 1]),
        ("No. 1: <img>b/0.jpg</img>\nQ", 1, "No. 1: <image>\nQ", [0]),
        ("Is <image1> in <image>?", 1, "Is <image1> in <image>?", [0]),
    ],
)
def test_mark_is_replaced_by_the_image_that_it_stands_for(text, files, expected, order):
    converted = normalise(chat(text, images=[f"{number}.jpg" for number in range(files)]))
    assert converted["messages"][0]["content"] == expected
    assert converted["images"] == [f"{number}.jpg" for number in order]


@pytest.mark.parametrize(
    ("text", "files", "mark"),
    [
        ("<ImageHere>", 2, "<ImageHere>"),
        ("<image><|image_pad|>", 1, "<|image_pad|>"),
        ("<image><ImageHere>", 2, "<ImageHere>"),
        ("<image1><image1>", 2, "<image1>"),
        ("<image2>", 1, "<image2>"),
        ("<image1><IMAGE>", 2, "<IMAGE>"),
        ("<img>other.jpg</img>", 1, "other.jpg"),
        ("<bbox>", 1, None),
    ],
)
def test_ambiguous_mark_is_rejected_by_name(text, files, mark, tmp_path):
    record = chat(text, images=[f"{number}.jpg" for number in range(files)])
    if mark:
        reason, detail = rejected(record)
        assert reason == "media_mismatch"
        assert mark in detail
    else:
        (tmp_path / "0.jpg").write_bytes(encoded(pattern(40, 60)))
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        [found] = read(opened(tmp_path / "x.jsonl"))[1]
        assert found.reason == "media_mismatch"
        assert "<bbox>" in found.detail


def test_path_in_a_mark_names_the_file():
    converted = normalise({"conversations": [{"from": "user", "value": "1: <img>a/b.jpg</img>"}, ANSWER]})
    assert converted["images"] == ["a/b.jpg"]
    assert converted["messages"][0]["content"] == "1: <image>"
    named = {"image": {"<image_01>": "b.jpg", "<image_00>": "a.jpg"}, **chat("<image_00> <image_01>")}
    assert normalise(named)["images"] == ["a.jpg", "b.jpg"]


def test_video_marks_are_replaced_like_image_marks():
    for text in ("<image>\nQ", "<VIDEO>\nQ", "<video1>\nQ", "<|vision_start|><|video_pad|><|vision_end|>\nQ"):
        converted = normalise(chat(text, video="a.mp4"))
        assert (converted["messages"][0]["content"], converted["videos"]) == ("<video>\nQ", ["a.mp4"])


def test_marks_in_a_chat_without_media_are_text(tokenizer: GlmTokenizer):
    text = "<|image|> <ImageHere> <image1> <IMAGE> <img>x</img> <bbox> <ref-object> <|begin_of_image|> [IMG]"
    converted = normalise(chat(text, text))
    assert [turn["content"] for turn in converted["messages"]] == [text, text]
    ids = tokenize(build_sample(converted, images=0, videos=0), tokenizer).input_ids.tolist()
    assert not {tokenizer.special[name] for name in ("<|image|>", "<|begin_of_image|>")} & set(ids)


SWIFT = chat("<image>Find <ref-object>", "<bbox> and <bbox>", images=["a.jpg"])
BOXES = [[30, 10, 120, 160], [150, 20, 250, 165]]
OBJECTS = {"ref": ["player"], "bbox": BOXES}


@pytest.mark.parametrize(
    "objects",
    [
        OBJECTS,
        json.dumps(OBJECTS),
        {**OBJECTS, "bbox_type": "real", "image_id": [0, 0]},
        {**OBJECTS, "bbox": [[120, 10, 30, 160], BOXES[1]]},
        {**OBJECTS, "bbox_type": "norm1", "bbox": [[x / 300, y / 168, z / 300, w / 168] for x, y, z, w in BOXES]},
        {**OBJECTS, "bbox_type": "norm1000", "bbox": [[100, 59, 400, 952], [500, 119, 833, 982]]},
        [{"caption": "player", "bbox": BOXES[0]}, {"bbox": BOXES[1], "bbox_type": "real", "image": 0}],
    ],
)
@pytest.mark.parametrize("own", [{}, {"domain": "chat"}])
def test_boxes_of_ms_swift_are_written_in_thousandths(objects, own, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(pattern(168, 300)))
    (tmp_path / "x.jsonl").write_text(json.dumps({**SWIFT, **own, "objects": objects}))
    [draft], no_rejections = read(opened(tmp_path / "x.jsonl"))
    assert not no_rejections
    contents = [turn["content"] for turn in draft.record["messages"]]
    assert contents == ["<image>Find player", "[[100,59,400,952]] and [[500,119,833,982]]"]
    assert "objects" not in draft.record


def read_turned(folder: Path, **objects: Any) -> str:
    """Return the answer with the box (30, 10, 120, 160) in an image of 168x300, stored on its side; else the reason."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with open(folder / "a.jpg", "wb") as file:
        Image.fromarray(pattern(168, 300)).save(file, "JPEG", exif=exif)
    record = chat("<image>Where?", "<bbox>", images=["a.jpg"], objects={"bbox": BOXES[:1], **objects})
    (folder / "x.jsonl").write_text(json.dumps(record))
    drafts, rejections = read(opened(folder / "x.jsonl"))
    return drafts[0].record["messages"][1]["content"] if drafts else rejections[0].reason


def test_boxes_of_a_turned_image_need_its_size(tmp_path):
    assert read_turned(tmp_path) == "size_mismatch"
    assert read_turned(tmp_path, bbox_type="norm1000", bbox=[[100, 59, 400, 952]]) == "size_mismatch"
    # Orientation 6 turns (x, y) of 300x168 to (168 - y, x) of 168x300
    turned = "[[47,100,940,400]]"
    assert read_turned(tmp_path, width=[300], height=[168]) == turned
    steps = [[100, 59, 400, 952]]
    assert read_turned(tmp_path, width=[300], height=[168], bbox_type="norm1000", bbox=steps) == turned
    assert read_turned(tmp_path, width=[168], height=[300]) == "[[178,33,714,533]]"


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({**OBJECTS, "bbox": BOXES[:1]}, "media_mismatch"),
        ({**OBJECTS, "ref": ["a", "b"]}, "media_mismatch"),
        ({**OBJECTS, "image_id": [0, 1]}, "media_mismatch"),
        ({**OBJECTS, "bbox_type": "pixels"}, "unsupported_content"),
        ({**OBJECTS, "bbox": [[30, 10], [1, 2]]}, "unsupported_content"),
        ({**OBJECTS, "bbox": [[30, 10, 400, 160], BOXES[1]]}, "bad_box"),
        ({"ref": "player", "bbox": BOXES}, "bad_record"),
    ],
)
def test_boxes_that_do_not_fit_are_rejected(objects, reason, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(pattern(168, 300)))
    (tmp_path / "x.jsonl").write_text(json.dumps({**SWIFT, "objects": objects}))
    assert [entry.reason for entry in read(opened(tmp_path / "x.jsonl"))[1]] == [reason]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "value": "a.jpg"}, {"text": "Who?"}]},
                    {
                        "role": "assistant",
                        "content": [{"type": "reasoning", "value": "T"}, {"type": "text", "value": "me"}],
                        "loss_weight": 1.0,
                    },
                ]
            },
            [
                {"role": "user", "content": "<image>Who?"},
                {"role": "assistant", "content": "me", "reasoning_content": "T"},
            ],
        ),
        (
            {"conversations": json.dumps([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])},
            [ASK, ANSWER],
        ),
        (
            {"query": "Q", "response": "A", "history": [["Q", "A"]], "system": "S"},
            [{"role": "system", "content": "S"}, ASK, ANSWER, ASK, ANSWER],
        ),
        ({"prompt": "Q", "completion": "A"}, [ASK, ANSWER]),
        ({"prompt": "Q", "response": "A"}, [ASK, ANSWER]),
        ({"prompt": [ASK], "completion": [ANSWER]}, [ASK, ANSWER]),
        ({"conversation": [{"role": "human", "value": "Q"}, {"role": "gpt", "value": "A"}]}, [ASK, ANSWER]),
        ({"custom_id": "1", "body": {"model": "m", "messages": [ASK, ANSWER]}}, [ASK, ANSWER]),
    ],
)
def test_more_formats_are_read(record, messages):
    assert is_foreign_chat(record)
    assert normalise(record)["messages"] == messages


def test_parts_that_number_their_images_get_them_in_this_order():
    content = [
        {"type": "image", "index": 1, "text": None},
        {"type": "image", "index": 0},
        {"type": "text", "text": "Q"},
    ]
    converted = normalise({"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.jpg", "b.jpg"]})
    assert converted["images"] == ["b.jpg", "a.jpg"]


def test_unknown_keys_are_kept_or_counted():
    image = {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "high"}, "min_pixels": 4}
    record = {"messages": [{"role": "user", "content": [image], "name": "Ann"}, {**ANSWER, "id": 7, "score": None}]}
    notes: Counter[str] = Counter()
    converted = normalise(record, notes)
    assert converted["messages"] == [{"role": "user", "content": "<image>", "name": "Ann"}, {**ANSWER, "id": 7}]
    assert notes == {"part key detail": 1, "part key min_pixels": 1}


def test_messages_are_accounted_for(tmp_path):
    lines = [
        {"messages": [ASK, ANSWER]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "robot", "value": "A"}]},
        {"query": "Q", "response": "A", "history": [["Q", "A"]], "system": "S"},
        {"domain": "chat", "messages": [{"role": "system", "content": "S"}, ASK, ANSWER]},
        {"messages": [{"role": "system", "content": ""}, ASK, ANSWER]},
        {"messages": []},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drafts, rejections = read(opened(tmp_path / "x.jsonl"))
    assert [draft.items.get("messages") for draft in drafts] == [2, 5, 3, 3]
    assert [(entry.reason, entry.items.get("messages")) for entry in rejections] == [
        ("unknown_role", 2),
        ("bad_record", None),
    ]
    assert drafts[3].not_read == {"system message without text": 1}


def test_chat_of_a_table_has_its_marks_obeyed(tmp_path):
    """A table gives every message all keys of its column, null where there is none."""
    turns = [
        {"role": "user", "content": "<image>Find <ref-object>", "loss": None},
        {"role": "assistant", "content": "<bbox><bbox>", "loss": False},
        {"role": "user", "content": "Q", "loss": None},
        {"role": "assistant", "content": "A", "loss": True},
    ]
    image = {"bytes": encoded(pattern(168, 300)), "path": None}
    pq.write_table(
        pa.Table.from_pylist([{"messages": turns, "images": [image], "objects": OBJECTS}]), tmp_path / "x.parquet"
    )
    [draft], no_rejections = read(opened(tmp_path / "x.parquet"))
    assert not no_rejections
    assert draft.record["messages"] == [
        {"role": "user", "content": "<image>Find player"},
        {"role": "assistant", "content": "[[100,59,400,952]][[500,119,833,982]]", "loss": False},
        ASK,
        ANSWER,
    ]
