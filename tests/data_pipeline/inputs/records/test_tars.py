"""Webdataset tars from other tools, whole and damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.records.tars import Tars
from tests.data_pipeline.inputs.reading import JPEG, PNG, opened, read

pytestmark = pytest.mark.fast


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_img2dataset_and_glmv_samples_are_read_from_one_tar(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        about = {"caption": "A cat.", "url": "http://x/1.jpg", "status": "success", "width": 60}
        writer.write({"__key__": "000", "jpg": JPEG, "txt": "A cat.", "json": about})
        writer.write({"__key__": "001", "jpg": JPEG, "json": {"alt": "A dog."}})
        writer.write({"__key__": "002", "jpg": JPEG, "cls": 3})
        own = {"domain": "interleaved", "text": "<image><image>", "source": "b.jsonl:1"}
        writer.write({"__key__": "003", "json": own, "1.jpg": JPEG, "0.png": PNG})
    drafts, rejected = read(opened(tmp_path / "a.tar"))
    assert [draft.record for draft in drafts] == [{**about, "domain": "image_text", "text": "A cat."}, own]
    assert drafts[1].images == [Media("png", PNG), Media("jpg", JPEG)]
    assert [draft.origin for draft in drafts] == ["a.tar/000", "a.tar/003"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.tar/001", "no_caption"),
        ("a.tar/002", "no_caption"),
    ]
    drafts, _ = read(opened(tmp_path / "a.tar", settings=["text=alt"]))
    assert drafts[1].record["text"] == "A dog."


def test_caption_whose_image_is_skipped_is_rejected(tmp_path):
    files = {"1.left.jpg": JPEG, "1.right.jpg": JPEG, "1.txt": b"Two views.", "._2.jpg": b"of a Mac", "2.txt": b"Lost."}
    path = write_tar(tmp_path / "a.tar", {**files, "3.jpg": JPEG, "3.mask.png": PNG, "3.txt": b"A cat."})
    drafts, rejected = read(opened(path))
    assert [(draft.origin, draft.images) for draft in drafts] == [("a.tar/3", [Media("jpg", JPEG)])]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.tar/1", "missing_member"),
        ("a.tar/2", "missing_member"),
    ]
    assert "1.right.jpg is not read, and the text has no other file: use the names KEY.jpg" in rejected[0].detail
    assert "--set domain=text" in rejected[1].detail
    drafts, _ = read(opened(path, settings=["domain=text"]))
    assert [draft.record["text"] for draft in drafts][:2] == ["Two views.", "Lost."]


def test_tar_without_media_becomes_text(tmp_path):
    [draft], _ = read(opened(write_tar(tmp_path / "b.tar", {"1.txt": b"Words.", "._1.jpg": b"of a Mac"})))
    assert draft.record == {"domain": "text", "text": "Words."}


def test_conversations_in_tars_get_their_images(tmp_path):
    turns = [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "A cat."}]
    records = {
        "1": {"conversations": turns},
        "2": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]},
        "3": {"conversations": turns * 2},
    }
    files: dict[str, bytes] = {}
    for key, record in records.items():
        files |= {f"{key}.json": json.dumps(record).encode(), f"{key}.jpg": JPEG}
    drafts, rejected = read(opened(write_tar(tmp_path / "a.tar", files)))
    assert [draft.record["messages"][0]["content"] for draft in drafts] == ["What is <image>?", "<image>What?"]
    assert {draft.record["domain"] for draft in drafts} == {"chat"}
    assert [draft.images for draft in drafts] == [[Media("jpg", JPEG)]] * 2
    assert [(entry.origin, entry.reason) for entry in rejected] == [("a.tar/3", "media_mismatch")]


def test_damaged_and_hostile_tars_are_rejected_in_part(tmp_path):
    files = {"a.txt": b"A cat.", "a.jpg": JPEG, "../../b.txt": b"x", "c.txt": b"y", "c.jpg": JPEG}
    whole = write_tar(tmp_path / "odd.tar", files).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 1024 + 512 + len(JPEG)])
    (tmp_path / "no.tar").write_bytes(b"hello" * 1000)
    drafts, rejected = read(Tars(tuple(str(tmp_path / name) for name in ("cut.tar", "no.tar", "odd.tar"))))
    assert {entry.reason for entry in rejected} >= {"not_a_tar", "path_traversal", "truncated_tar"}
    assert {draft.origin for draft in drafts} >= {"odd.tar/a", "odd.tar/c"}


def test_chat_that_names_its_image_gets_the_member(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    record = json.dumps({"conversations": turns, "image": "train/1.jpg"}).encode()
    files = {"1.json": record, "1.jpg": JPEG, "2.json": record, "3.jpg": JPEG}
    own = json.dumps({"domain": "image_text", "text": "a"}).encode()
    drafts, rejected = read(opened(write_tar(tmp_path / "a.tar", {**files, "3.json": own, "3.txt": b"b"})))
    assert [(draft.origin, draft.images) for draft in drafts] == [(f"a.tar/{n}", [Media("jpg", JPEG)]) for n in (1, 3)]
    assert drafts[0].record["messages"][0]["content"] == "<image>What?"
    assert [draft.not_read for draft in drafts] == [{"field image": 1}, {"member .txt (KEY.json has the text)": 1}]
    assert [(entry.origin, entry.reason) for entry in rejected] == [("a.tar/2", "missing_file")]


def test_several_images_of_a_caption_come_before_it(tmp_path):
    files = {"1.0.jpg": JPEG, "1.1.jpg": JPEG, "1.txt": b"Two."}
    [draft], _ = read(opened(write_tar(tmp_path / "a.tar", files)))
    assert draft.record == {"domain": "interleaved", "text": "<image><image>Two."}


def test_domain_of_null_means_that_there_is_none(tmp_path):
    record = json.dumps({"domain": None, "text": "A cat."}).encode()
    drafts, rejected = read(Tars((str(write_tar(tmp_path / "a.tar", {"1.jpg": JPEG, "1.json": record})),)))
    assert not rejected
    assert [(draft.record["domain"], draft.record["text"]) for draft in drafts] == [("image_text", "A cat.")]


VERL = {
    "data_source": "hiyouga/geometry3k",
    "prompt": [{"role": "user", "content": "<image>Find x."}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "48"},
}
GLMV = {"prompt": "Find x.", "gt_answer": "<think>.</think><|begin_of_box|>48<|end_of_box|>", "datasource": "geometry"}


def test_prompts_of_other_tools_are_read_from_tars(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "png": PNG, "json": VERL})
        writer.write({"__key__": "1", "jpg": JPEG, "json": GLMV, "txt": "Find x."})
        writer.write({"__key__": "2", "jpg": JPEG, "json": {**VERL, "agent_name": "tool_agent"}})
    drafts, rejected = read(opened(tmp_path / "a.tar", settings=["verifiers=geometry:vqa", "verifier=math"]))
    common = {"domain": "rl", "messages": [{"role": "user", "content": "<image>Find x."}], "reference": "48"}
    assert [draft.record for draft in drafts] == [
        {**common, "verifier": "math", "data_source": "hiyouga/geometry3k", "category": "math"},
        {**common, "verifier": "vqa", "data_source": "geometry"},
    ]
    assert [draft.images for draft in drafts] == [[Media("png", PNG)], [Media("jpg", JPEG)]]
    assert drafts[1].not_read == {"member .txt (KEY.json has the text)": 1}
    assert [(entry.origin, entry.reason) for entry in rejected] == [("a.tar/2", "unsupported_environment")]


def test_options_of_prompts_make_prompts_of_a_tar(tmp_path):
    record = {"query": "How many?", "answer": "7", "note": "x"}
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "jpg": JPEG, "json": record})
    [draft], _ = read(opened(tmp_path / "a.tar", settings=["verifier=counting"]))
    assert (draft.record["messages"][0]["content"], draft.record["reference"]) == ("<image>How many?", "7")
    with pytest.raises(DataError, match="--set verifier is for prompts"):
        opened(tmp_path / "a.tar", settings=["verifier=counting", "domain=chat"])
