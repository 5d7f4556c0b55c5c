"""Prompts of other tools: verl's tables as pyarrow writes them, GLM-V's records, questions with answers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.domains import build_sample
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected
from tests.data_pipeline.inputs.reading import JPEG, PNG, opened, read
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# The columns of examples/data_preprocess/geo3k.py of verl, as datasets.Dataset.to_parquet declares them.
VERL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("images", pa.list_(IMAGE)),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [("answer", pa.string()), ("index", pa.int64()), ("question", pa.string()), ("split", pa.string())]
            ),
        ),
    ],
    metadata={
        "huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        "images": {"feature": {"_type": "Image"}, "_type": "List"},
                        "ability": {"dtype": "string", "_type": "Value"},
                    }
                }
            }
        )
    },
)
BOXED = r" You FIRST think about the reasoning process. The final answer MUST BE put in \boxed{}."


def verl_row(number: int = 0, instruction: str = "", **changed: Any) -> dict[str, Any]:
    question = "<image>Find x."
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": question + instruction}],
        "images": [{"bytes": JPEG, "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"split": "train", "index": number, "answer": "7", "question": question},
        **changed,
    }


def verl_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = VERL) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (path.parent / "a.jpg").write_bytes(JPEG)
    (path.parent / "b.png").write_bytes(PNG)
    return path


def test_verl_table_becomes_prompts(tmp_path):
    rows = [verl_row(), verl_row(1, prompt=[{"role": "system", "content": "Be brief."}, *verl_row()["prompt"]])]
    drafts, rejected = read(opened(verl_table(tmp_path / "train.parquet", rows), settings=["verifier=math"]))
    assert not rejected
    assert drafts[0].record == {
        "domain": "rl",
        "messages": [{"role": "user", "content": "<image>Find x."}],
        "reference": "7",
        "verifier": "math",
        "data_source": "hiyouga/geometry3k",
        "category": "math",
        "extra_info": {"answer": "7", "index": 0, "question": "<image>Find x.", "split": "train"},
    }
    assert drafts[0].images == [Media("jpg", JPEG)]
    assert [turn["role"] for turn in drafts[1].record["messages"]] == ["system", "user"]
    assert build_sample(drafts[1].record, images=1, videos=0).domain == "rl"
    assert drafts[0].read_as["column reward_model"] == "reference"


def test_verifier_follows_the_data_source(tmp_path):
    rows = [verl_row(), verl_row(data_source="b:c"), verl_row(data_source="other")]
    path = verl_table(tmp_path / "train.parquet", rows)
    drafts, rejected = read(opened(path, settings=["verifiers=hiyouga/geometry3k:math,b:c:ocr"]))
    assert [draft.record["verifier"] for draft in drafts] == ["math", "ocr"]
    assert [(entry.reason, entry.items) for entry in rejected] == [("no_verifier", {"rows": 1})]
    assert "--set verifier=NAME, or --set verifiers=other:NAME" in rejected[0].detail
    drafts, _ = read(opened(path, settings=["verifiers=b:c:ocr", "verifier=vqa"]))
    assert [draft.record["verifier"] for draft in drafts] == ["vqa", "ocr", "vqa"]


def test_verifier_of_the_user_beside_that_of_the_record_is_named(tmp_path):
    records = [{"question": "1 + 1?", "answer": "2", "verifier": name} for name in ("math", "exact")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    drafts, [] = read(opened(tmp_path / "a.jsonl", settings=["verifier=exact"]))
    assert [draft.record["verifier"] for draft in drafts] == ["math", "exact"]
    assert [dict(draft.not_read) for draft in drafts] == [{"option verifier=exact, where a record says math": 1}, {}]


def test_instruction_to_write_boxed_is_rejected_and_another_field_is_taken(tmp_path):
    path = verl_table(tmp_path / "train.parquet", [verl_row(instruction=BOXED)])
    _, [rejected] = read(opened(path, settings=["verifier=math"]))
    assert rejected.reason == "foreign_answer_form"
    assert "--set question=extra_info.question" in rejected.detail
    options = ["verifier=math", "question=extra_info.question", "reference=extra_info.answer"]
    [draft], _ = read(opened(path, settings=options))
    assert draft.record["messages"] == [{"role": "user", "content": "<image>Find x."}]
    assert draft.record["reference"] == "7"
    assert draft.not_read == {"column prompt": 1}


@pytest.mark.parametrize(
    ("changed", "reason", "says"),
    [
        ({"reward_model": {"style": "model", "ground_truth": "7"}}, "unsupported_reward", "style is 'model'"),
        ({"reward_model": {"style": "rule"}}, "bad_reference", "no ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": ["7", "8"]}}, "bad_reference", "a list of several"),
        ({"reward_model": {"style": "rule", "ground_truth": True}}, "bad_reference", "its reference is true"),
        ({"extra_info": {"need_tools_kwargs": True}}, "unsupported_environment", "extra_info.need_tools_kwargs"),
        ({"extra_info": {"interaction_kwargs": {"name": "x"}}}, "unsupported_environment", "interaction_kwargs"),
        ({"agent_name": "tool_agent"}, "unsupported_environment", "agent_name is 'tool_agent'"),
        ({"prompt": [{"role": "robot", "content": "<image>x"}]}, "unknown_role", "robot"),
        ({"prompt": [{"role": "user", "content": "Find x. <image> <image>"}]}, "media_mismatch", "2 <image>"),
        ({"images": ["gone.jpg"]}, "missing_file", "gone.jpg"),
        ({"prompt": 3}, "bad_record", "neither a text nor a list"),
        ({"prompt": "[gMASK]<sop><|user|>\nx"}, "bad_record", "with the chat template already"),
    ],
)
def test_what_would_change_the_meaning_is_rejected_by_name(changed, reason, says, tmp_path):
    record = {**verl_row(images=["a.jpg"]), **changed}
    _, [rejected] = read(opened(lines(tmp_path / "train.jsonl", record), settings=["verifier=math"]))
    assert (rejected.reason, says in rejected.detail) == (reason, True), rejected.detail


def test_harmless_keys_of_verl_are_accepted_and_counted(tmp_path):
    record = verl_row(
        images=[{"image": "file://a.jpg"}],
        reward_model={"style": "rule", "ground_truth": 7, "hash": "ab"},
        extra_info={"need_tools_kwargs": False, "interaction_kwargs": {"name": None}},
        agent_name="single_turn_agent",
    )
    [draft], [] = read(opened(lines(tmp_path / "train.jsonl", record), settings=["verifier=math"]))
    assert (draft.record["reference"], draft.images) == ("7", [Media("jpg", JPEG)])
    assert draft.not_read == {"field reward_model.hash": 1}


def test_record_of_glm_v_becomes_a_prompt(tmp_path):
    answer = "<think>\n15 + 27 = 42\n</think>\n<answer>\nIt is <|begin_of_box|>42<|end_of_box|>.\n</answer>"
    one = {"prompt": "What is 15 + 27?", "gt_answer": answer, "datasource": "math", "image_file": "a.jpg"}
    many = {"prompts": ["<image>Which?"], "gt_answers": ["<answer>a cat</answer>"], "datasources": ["vqa"]}
    path = lines(tmp_path / "r.jsonl", one, {**many, "image_files": ["b.png"], "answers": ["a dog"], "uuids": ["1"]})
    drafts, [] = read(opened(path, settings=["verifiers=math:math,vqa:vqa"]))
    assert drafts[0].record == {
        "domain": "rl",
        "messages": [{"role": "user", "content": "<image>What is 15 + 27?"}],
        "reference": "42",
        "verifier": "math",
        "data_source": "math",
    }
    assert (drafts[1].record["reference"], drafts[1].images) == ("a cat", [Media("png", PNG)])
    assert drafts[1].record["answers"] == ["a dog"]  # stored, and counted as unused


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"question": "How many?", "answer": "7", "image": "a.jpg", "verifier": "counting"}, {"reference": "7"}),
        ({"problem": "<image>How many?", "answer": 7, "images": ["a.jpg"]}, {"reference": "7", "verifier": "math"}),
        ({"problem": "<image>How many?", "solution": "<answer> 7 </answer>", "image": "a.jpg"}, {"reference": "7"}),
        ({"query": "Where?", "ground_truth": [[1, 2, 3, 4]], "image": "a.jpg"}, {"reference": "[[1, 2, 3, 4]]"}),
        ({"prompt": "Tap", "reference": {"action": "tap"}, "image": "a.jpg"}, {"reference": '{"action": "tap"}'}),
        (
            {"question": "A. 1 B. 7?", "choices": ["1", "7"], "answer": ["B"], "img": "a.jpg", "tier": "hard"},
            {"reference": "B", "settings": {"options": ["1", "7"]}, "tier": "hard"},
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>How many?"}], "answer": "7", "image_path": "a.jpg"},
            {"messages": [{"role": "user", "content": "<image>How many?"}]},
        ),
        (
            {"question": "How many?", "answer": "7", "image": "a.jpg", "thinking": False, "category": "dots", "id": 3},
            {"thinking": False, "category": "dots", "id": 3},
        ),
        (
            {
                "domain": "rl",
                "messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"text": "How?"}]}],
                "reference": "7",
                "verifier": "ocr",
                "settings": {"ignore_case": True},
            },
            {"verifier": "ocr", "settings": {"ignore_case": True}},
        ),
        ({"question": "How?", "answer": "7", "image": {"bytes": base64.b64encode(JPEG).decode()}}, {"reference": "7"}),
    ],
)
def test_questions_with_answers_become_prompts(given, kept, tmp_path):
    [draft], [] = read(opened(lines(tmp_path / "q.jsonl", given), settings=["verifier=math"]))
    assert draft.record["domain"] == "rl"
    assert {name: draft.record[name] for name in kept} == kept
    assert draft.record["messages"][0]["content"].startswith("<image>")
    assert draft.images == [Media("jpg", JPEG)]
    build_sample(draft.record, images=1, videos=0)


@pytest.mark.parametrize(
    ("given", "reason", "says"),
    [
        ({"answer": "7"}, "bad_record", "it has no question"),
        ({"question": "a", "problem": "b", "answer": "7"}, "bad_record", "question and problem may be its question"),
        ({"question": "a"}, "bad_reference", "it has no reference"),
        ({"question": "a", "answer": "7", "ground_truth": "8"}, "bad_reference", "ground_truth and answer may be"),
        ({"question": "a", "solution": "By Pythagoras, 7."}, "bad_reference", "--set reference=solution"),
        ({"question": "a", "answer": "7", "image": {"x": 1}}, "missing_file", "without the bytes"),
        ({"question": "a", "answer": "7", "photo_path": ["a.jpg", 3]}, "bad_record", "called like images"),
        ({"question": "a", "answer": "7", "options": ["x"]}, "options_not_asked", "'x' is not in the question"),
        ({"question": "x", "answer": "7", "options": ["x"], "settings": [1]}, "bad_record", "settings are no object"),
        ({"question": "a", "answer": "7", "audio": "a.wav"}, "unsupported_audio", "audio"),
    ],
)
def test_unclear_questions_are_rejected_by_name(given, reason, says, tmp_path):
    drafts, rejected = read(opened(lines(tmp_path / "q.jsonl", given), settings=["verifier=math"]))
    [found] = rejected or [rejection_of(drafts[0])]
    assert (found.reason, says in found.detail) == (reason, True), found.detail


def rejection_of(draft: Draft) -> Rejected:
    """Return the rejection that a build makes of a draft which cannot be rendered."""
    with pytest.raises(BadSample) as caught:
        build_sample(draft.record, images=len(draft.images), videos=0)
    return Rejected(draft.origin, caught.value.reason, caught.value.detail)


def test_options_about_prompts_are_for_prompts_alone(tmp_path):
    path = lines(tmp_path / "q.jsonl", {"question": "a", "answer": "7"})
    with pytest.raises(DataError, match="--set verifier is for prompts, but --set domain=chat: use domain=rl"):
        opened(path, settings=["verifier=math", "domain=chat"])
    with pytest.raises(DataError, match="verifiers=geometry3k: write SOURCE:VERIFIER"):
        opened(path, settings=["verifiers=geometry3k"])
    [draft], [] = read(opened(path))  # without an option it stays a conversation
    assert draft.record["domain"] == "chat"


def test_table_of_questions_becomes_prompts(tmp_path):
    rows = [{"problem": "How many?", "answer": "7", "image": {"bytes": PNG, "path": None}, "mask": b"x"}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    drafts, [] = read(opened(tmp_path / "q.parquet", settings=["domain=rl", "verifier=counting"]))
    assert [draft.record["messages"][0]["content"] for draft in drafts] == ["<image>How many?"] * 2
    assert drafts[0].images == [Media("png", PNG)]


def test_several_images_and_large_ones_stay_as_they_are(tmp_path):
    images = [encoded(pattern(40 + number, 60, number), kind) for number, kind in enumerate(("JPEG", "PNG", "JPEG"))]
    prompt = [{"role": "user", "content": "<image> and <image> or <image>?"}]
    row = verl_row(prompt=prompt, images=[{"bytes": data, "path": None} for data in images])
    [draft], [] = read(opened(verl_table(tmp_path / "m.parquet", [row]), settings=["verifier=vqa"]))
    assert [file.data for file in draft.images] == images
