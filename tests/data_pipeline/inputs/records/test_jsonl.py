"""Records in JSON lines and JSON lists, and the files that they name."""

from __future__ import annotations

import base64
import json
from collections import Counter

import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Media, NotRead
from data_pipeline.inputs.records import jsonl
from tests.data_pipeline.inputs.reading import JPEG, MP4, PNG, opened, read

pytestmark = pytest.mark.fast


def test_every_line_is_read_once_for_any_unit_size(tmp_path, monkeypatch):
    lines = [json.dumps({"domain": "text", "text": "ä" * (n % 50)}, ensure_ascii=False) for n in range(300)]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\r\n".join(lines) + "\n\n \n{broken\n[1]\n" + lines[7], encoding="utf-8")
    drafts, rejected = read(opened(path))
    for unit_bytes in (1, 100, 3000):
        monkeypatch.setattr(jsonl, "UNIT_BYTES", unit_bytes)
        assert len(opened(path).units()) > 1
        assert read(opened(path)) == (drafts, rejected)
    assert [draft.record for draft in drafts] == [*map(json.loads, lines), json.loads(lines[7])]
    assert [draft.origin for draft in drafts] == [*(f"a.jsonl:{n}" for n in range(1, 301)), "a.jsonl:305"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [(f"a.jsonl:{n}", "bad_record") for n in (303, 304)]


def test_line_that_exceeds_the_limit_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_VALUE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "{" + "x" * 5000 + '}\n{"text": "b"}\n' + "y" * 3000)
    drafts, rejected = read(opened(path))
    assert [draft.record["text"] for draft in drafts] == ["a", "b"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.jsonl:2", "member_too_large"),
        ("a.jsonl:4", "member_too_large"),
    ]


def test_long_line_counts_once_in_the_estimated_size(tmp_path):
    (tmp_path / "big.jpg").write_bytes(bytes(1_000_000))
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a", "images": ["big.jpg"]}', '{"text": "' + "x" * 100_000 + '"}', '{"text": "b"}']
    path.write_text("\n".join(lines) + "\n")
    estimated = sum(unit.bytes for unit in opened(path).units())
    assert estimated == pytest.approx(path.stat().st_size + 1_000_000, rel=0.01)


@pytest.mark.parametrize("indent", [1, None])
def test_file_of_one_object_that_is_no_record_is_refused(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [], "annotations": []}, indent=indent))
    with pytest.raises(DataError, match=r"one object, not a list of records: .*--kind grounding"):
        opened(path).units()
    path.write_text(json.dumps({"version": 1, "data": [{"text": "a"}], "split": "train"}, indent=indent))
    with pytest.raises(DataError, match=r"--set records=data"):
        opened(path).units()


def test_single_file_is_read_under_its_usual_names(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "a.mp4").write_bytes(MP4)
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A cat."}]
    records = [
        *(
            {name: "a.jpg", "caption": "A cat."}
            for name in ("image", "img", "image_path", "Image", "file_name", "filepath")
        ),
        {"video": "a.mp4", "text": "A cat."},
        {"image": "a.jpg", "filename": "original.jpg", "text": "A cat."},
        {"image_2": "a.jpg", "image_1": "a.jpg", "text": "Two."},
        {"images": ["a.jpg"], "text": "See <image> here."},
        {"domain": "grounding", "text": "<image>The cat [[1,2,3,4]].", "image": "a.jpg"},
        {"domain": "chat", "messages": turns, "video": "a.mp4"},
        {"domain": "text", "text": "About an image.", "image": "a.jpg"},
        {"image": f"data:image/png;base64,{base64.b64encode(PNG).decode()}", "text": "A cat."},
        {"image": base64.b64encode(PNG).decode(), "text": "A cat."},
        {"image": {"bytes": None, "path": "a.jpg"}, "text": "A cat."},
        {"images": "a.jpg", "text": "A cat."},
        {"mp4": "a.mp4", "text": "A cat."},
        {"image": "a.jpg", "domain": "image_text", "text": "A cat.", "caption": "Another text."},
    ]
    drafts, rejected = read(opened(write_lines(tmp_path / "a.jsonl", records)))
    assert not rejected
    cat = {"domain": "image_text", "text": "A cat."}
    assert [draft.record for draft in drafts] == [
        *[cat] * 6,
        {"domain": "video", "text": "A cat."},
        {**cat, "filename": "original.jpg"},
        {"domain": "interleaved", "text": "<image><image>Two."},
        {"domain": "interleaved", "text": "See <image> here."},
        {"domain": "grounding", "text": "<image>The cat [[1,2,3,4]]."},
        {"domain": "chat", "messages": turns},
        {"domain": "text", "text": "About an image.", "image": "a.jpg"},
        *[cat] * 4,
        {"domain": "video", "text": "A cat."},
        {**cat, "caption": "Another text."},
    ]
    assert [len(draft.images) for draft in drafts] == [1, 1, 1, 1, 1, 1, 0, 1, 2, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1]
    assert [len(draft.videos) for draft in drafts] == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert drafts[1].read_as == {"field img": "images", "field caption": "text"}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ({"pic_of_it": "a.jpg", "caption": "x"}, "bad_record", "--set image=pic_of_it, or --set domain=text"),
        ({"frames": ["a.jpg", "b.png"], "caption": "x"}, "bad_record", "--set image=frames"),
        (
            {"image": "a.jpg", "photo": "b.jpg", "text": "x"},
            "bad_record",
            "--set image=image,photo or --set image=image",
        ),
        ({"image": "a.jpg", "text": "x", "caption": "y"}, "bad_record", "text and caption may be its text"),
        ({"image": "a.jpg", "caption": "x", "recaption": "y"}, "bad_record", "--set text=caption"),
        ({"image": "a.jpg", "label": 3}, "no_caption", "--set text=FIELD"),
        ({"pic_of_it": "a.jpg", "question": "x", "answer": "y"}, "bad_record", "--set image=pic_of_it"),
        ({"url": "http://x/a", "caption": "x", "width": 3}, "remote_file", "img2dataset, or --set domain=text"),
        ({"caption": "x", "label": 3}, "missing_file", "--set image=FIELD, or --set domain=text"),
        ({"instruction": "Hi", "input": "x", "caption": "y"}, "missing_file", "--set image=FIELD"),
        ({"URL": "http://x/a", "TEXT": "x"}, "remote_file", "'URL' is a URL"),
        ({"domain": "image_text", "messages": [], "image": "a.jpg"}, "bad_record", "a conversation has domain chat"),
        ({"image": "a.jpg", "captions": [{"start": 0, "end": 1, "text": "x"}]}, "bad_record", "--kind clips"),
        ({"image": "a.jpg", "captions": ["", " "]}, "no_caption", "empty"),
    ],
)
def test_record_with_two_readings_is_rejected_with_the_option(tmp_path, record, reason, message):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(JPEG)
    drafts, [rejected] = read(opened(write_lines(tmp_path / "a.jsonl", [record])))
    assert not drafts
    assert rejected.reason == reason
    assert message in rejected.detail


def test_fields_are_read_as_named_by_the_user(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    record = {"pic": "a.jpg", "mask": "b.jpg", "caption": "x", "recaption": "y"}
    path = write_lines(tmp_path / "a.jsonl", [record])
    [draft], _ = read(opened(path, settings=["image=pic", "text=recaption"]))
    assert draft.record == {"domain": "image_text", "text": "y", "mask": "b.jpg", "caption": "x"}
    [draft], _ = read(opened(path, settings=["image=pic,mask", "text=caption"]))
    assert (draft.record["text"], len(draft.images)) == ("<image><image>x", 2)


@pytest.mark.parametrize("name", ["image", "images", "img", "image_path", "photo"])
def test_questions_and_conversations_get_their_images(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    pairs = [{"user": "Who?", "assistant": "Me.", "source": "s"}]
    files = ["a.jpg"] if name == "images" else "a.jpg"
    records = [
        {name: files, "texts": pairs},
        {name: files, "question": "Who?", "answer": "Me."},
        {name: files, "question": "Who?", "answer": ["Me."]},
        {name: files, "conversations": turns},
    ]
    drafts, rejected = read(opened(write_lines(tmp_path / "a.jsonl", records)))
    assert not rejected
    for draft in drafts:
        assert [turn["content"] for turn in draft.record["messages"]] == ["<image>Who?", "Me."]
        assert (draft.record["domain"], draft.images) == ("chat", [Media("jpg", JPEG)])
    _, [several] = read(opened(write_lines(tmp_path / "b.jsonl", [{"question": "Who?", "answer": ["Me.", "You."]}])))
    assert "or a list of one answer" in several.detail


@pytest.mark.parametrize(
    "record",
    [
        {"text": "A page."},
        {"text": "A page.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b/c"},  # C4
        {"text": "A page.", "id": "1", "dump": "CC", "url": "https://a.b", "language_score": 0.9},  # FineWeb
        {"text": "A page.", "id": "1", "metadata": {"url": "https://a.b"}},  # datatrove
    ],
)
def test_text_without_domain_is_a_text(tmp_path, record):
    [draft], _ = read(opened(write_lines(tmp_path / "a.jsonl", [record])))
    assert draft.record == {**record, "domain": "text"}
    assert not draft.images


def test_each_caption_becomes_a_sample(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    records = [{"image": "a.jpg", name: ["One.", "Two.", "Three."]} for name in ("captions", "caption")]
    path = write_lines(tmp_path / "a.jsonl", records)
    drafts, _ = read(opened(path))
    assert [draft.record["text"] for draft in drafts] == ["One.", "Two.", "Three."] * 2
    assert [draft.origin for draft in drafts][:3] == [f"a.jsonl:1#caption={number}" for number in (1, 2, 3)]
    drafts, _ = read(opened(path, settings=["captions=first"]))
    assert [(draft.record["text"], draft.origin) for draft in drafts] == [("One.", "a.jsonl:1"), ("One.", "a.jsonl:2")]
    assert [draft.not_read for draft in drafts] == [{"caption not chosen": 2}] * 2
    many = write_lines(tmp_path / "b.jsonl", records * 50)
    chosen = Counter(draft.record["text"] for draft in read(opened(many, settings=["captions=random"]))[0])
    assert chosen.keys() == {"One.", "Two.", "Three."}
    assert min(chosen.values()) > 15


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_form_of_a_file_is_found_from_its_content(tmp_path, name):
    path = tmp_path / name
    records = [{"text": f"Ä {number}"} for number in range(3)]
    forms = {
        "pretty list": json.dumps(records, indent=2),
        "compact list": json.dumps(records, ensure_ascii=False),
        "lines": "\n".join(map(json.dumps, records)),
        "pretty values": "\n".join(json.dumps(record, indent=2) for record in records),
        "list after a byte order mark": "\ufeff \n" + json.dumps(records, indent=1) + "\n\n",
    }
    for form, content in forms.items():
        path.write_text(content, encoding="utf-8")
        drafts, rejected = read(opened(path))
        assert [draft.record["text"] for draft in drafts] == ["Ä 0", "Ä 1", "Ä 2"], form
        assert [draft.origin for draft in drafts] == [f"{name}:{number}" for number in (1, 2, 3)]
        assert not rejected
    path.write_text(json.dumps(records[1], indent=2))
    assert [draft.record["text"] for draft in read(opened(path))[0]] == ["Ä 1"]
    path.write_text("[1]\n" + json.dumps(records[0]))  # a damaged line before others
    drafts, rejected = read(opened(path))
    assert ([draft.origin for draft in drafts], [entry.origin for entry in rejected]) == ([f"{name}:2"], [f"{name}:1"])


def test_domain_of_null_means_that_there_is_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"domain": None, "text": "Words."}))
    [draft], rejected = read(opened(path))
    assert not rejected
    assert draft.record == {"domain": "text", "text": "Words."}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused_with_the_command(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n', encoding=encoding)
    with pytest.raises(DataError, match=r"UTF-16 .*iconv -f UTF-16 -t UTF-8"):
        opened(path).units()


def test_list_under_a_key_is_read_and_other_keys_are_counted(tmp_path):
    path = tmp_path / "a.json"
    content = {"info": {"a": [1]}, "skip": [[1], {}], "data": [{"text": "a"}, {"text": "b"}], "version": 2}
    path.write_text(json.dumps(content))
    given = opened(path, settings=["records=data"])
    drafts, _ = read(given)
    assert [(draft.record["text"], draft.origin) for draft in drafts] == [("a", "a.json:1"), ("b", "a.json:2")]
    names = [entry.name for unit in given.units() for entry in given.read(unit) if isinstance(entry, NotRead)]
    assert names == ["key info of the file", "key skip of the file", "key version of the file"]
    with pytest.raises(DataError, match=r"no list 'rows': --set records=KEY .* info, skip, data, version"):
        opened(path, settings=["records=rows"]).units()


def test_empty_file_beside_others_has_a_name(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.jsonl").touch()
    given = opened(tmp_path)
    read(given)
    assert [x.name for unit in given.units() for x in given.read(unit) if isinstance(x, NotRead)] == [
        "empty file .jsonl"
    ]
    with pytest.raises(DataError, match="no record in it"):
        opened(tmp_path / "b.jsonl").units()


def test_json_list_is_read_entry_by_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "UNIT_BYTES", 100)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "a.json"
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    path.write_text(json.dumps([{"conversations": turns, "image": "a.jpg"}] * 5 + [3], indent=1))
    drafts, rejected = read(opened(path))
    assert [draft.origin for draft in drafts] == [f"a.json:{number}" for number in range(1, 6)]
    assert drafts[0].record["messages"][1] == {"role": "assistant", "content": "A cat."}
    assert drafts[0].images == [Media("jpg", JPEG)]
    assert [entry.origin for entry in rejected] == ["a.json:6"]


@pytest.mark.parametrize("name", ["a.json", "metadata.jsonl"])
def test_changed_file_is_read_again(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for text in ("before", "after"):
        record = {"file_name": "a.jpg", "images": ["a.jpg"], "domain": "image_text", "text": text}
        (tmp_path / name).write_text(json.dumps([record] if name == "a.json" else record))
        drafts, _ = read(opened(tmp_path / "a.json" if name == "a.json" else tmp_path))
        assert [draft.record["text"] for draft in drafts] == [text]


def test_files_outside_the_folder_of_the_records_are_rejected(tmp_path):
    outside, folder = tmp_path / "outside.jpg", tmp_path / "in"
    outside.write_bytes(JPEG)
    folder.mkdir()
    (folder / "link.jpg").symlink_to(outside)
    (folder / "endless.jpg").symlink_to("/dev/zero")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "own.jpg").write_bytes(JPEG)
    (folder / "own_link.jpg").symlink_to("own.jpg")
    data_uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    reasons = {
        "own.jpg": None,
        "../in/own.jpg": None,
        "own_link.jpg": None,
        data_uri: None,
        "../outside.jpg": "outside_folder",
        str(outside): "outside_folder",
        "link.jpg": "outside_folder",
        "endless.jpg": "outside_folder",
        "../../../../etc/passwd": "outside_folder",
        "loop.jpg": "missing_file",
        "a\0.jpg": "missing_file",
        "gone.jpg": "missing_file",
        "own.exe": "unknown_extension",
        "s3://bucket/a.jpg": "remote_file",
        "data:image/png;base64,AAAA": "unknown_extension",
    }
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "", "images": [name]}) + "\n" for name in reasons))
    drafts, rejected = read(opened(path))
    found = {entry.origin: entry.reason for entry in rejected}
    assert [found.get(f"a.jsonl:{number}") for number in range(1, len(reasons) + 1)] == list(reasons.values())
    assert [draft.images[0] for draft in drafts] == [*[Media("jpg", JPEG)] * 3, Media("png", PNG)]
    _, rejected = read(opened(path, settings=["allow_outside=true"]))
    assert "outside_folder" not in {entry.reason for entry in rejected}
    assert {entry.origin: entry.reason for entry in rejected}["a.jsonl:8"] == "missing_file"  # not a regular file


def rejections_of(path, *records, settings=()):
    path.write_text("\n".join(map(json.dumps, records)))
    return {int(x.origin.rpartition(":")[2]): x.reason for x in read(opened(path, settings=settings))[1]}


def test_odd_values_reject_their_record_alone(tmp_path):
    turns = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    cut_off = base64.b64encode(JPEG).decode()[:401]
    pair = {"chosen_response": "a", "rejected_response": "b", "messages": turns}
    records = (
        {"messages": turns, "image": "file://[a.jpg"},
        {"image": cut_off, "caption": "a"},
        {"question": "Q", "answer": "A", "texts": ["x"]},
        {"image": "x" * 9000, "caption": "a"},
        {"messages": [{"role": "user", "content": "Q"}, turns[1]], "thinking": "maybe"},
        pair,
    )
    expected = {1: "missing_file", 2: "unreadable_image", 4: "missing_file", 6: "preference_pair"}
    assert rejections_of(tmp_path / "a.jsonl", *records) == expected
    drafts, rejected = read(opened(tmp_path / "a.jsonl"))
    assert [draft.record.get("thinking") for draft in drafts] == [None, "maybe"]  # rejected when it is rendered
    assert max(len(entry.detail) for entry in rejected) < 300
    assert "chosen_response" in rejected[-1].detail


def test_domain_chat_converts_chats_and_questions(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    records = [{"messages": turns, "image": "a.jpg", "url": "http://x"}]
    records += [{"question": "Q", "answer": "A", "image": "a.jpg"}, {"texts": [{"user": "Q", "assistant": "A"}]}]
    path = tmp_path / "a.jsonl"
    assert rejections_of(path, *records, settings=["domain=chat"]) == {}
    drafts, _ = read(opened(path, settings=["domain=chat"]))
    assert [draft.record["messages"][0]["content"] for draft in drafts] == ["<image>Q", "<image>Q", "Q"]
    assert {draft.record["domain"] for draft in drafts} == {"chat"}


def test_link_of_a_chat_is_no_image(tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    records = [{"messages": turns, name: "http://x/1"} for name in ("url", "link", "image_url")]
    assert rejections_of(tmp_path / "a.jsonl", *records) == {3: "remote_file"}
    assert rejections_of(tmp_path / "a.jsonl", *records, settings=["domain=chat"]) == {}


def test_path_of_a_program_is_no_video(tmp_path):
    code = {"content": "let a = 1", "path": "src/a.ts", "language": "TypeScript"}
    assert rejections_of(tmp_path / "a.jsonl", code) == {}


def test_text_that_another_field_replaces_is_counted(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "text": "no", "summary": "yes"}))
    [draft], _ = read(opened(path, settings=["text=summary"]))
    assert (draft.record["text"], draft.not_read) == ("yes", {"field text": 1})


def test_second_object_beside_a_list_of_records_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": [{"text": "a"}]}\n{"data": [{"text": "b"}]}')
    with pytest.raises(DataError, match="more than one object"):
        list(opened(path, settings=["records=data"]).units())


@pytest.mark.parametrize(("name", "beside"), [("pic", {}), ("img", {}), ("image", {"mask": "b.png"})])
def test_option_names_the_image_of_a_chat(name, beside, tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns, name: "a.jpg", **beside}))
    [draft], _ = read(opened(path, settings=[f"image={name}"]))
    assert draft.record["messages"][0]["content"] == "<image>Q"
    assert draft.images == [Media("jpg", JPEG)]


def test_label_of_a_caption_is_not_that_of_an_answer(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    records = [{"image": "a.jpg", "caption": "a", "label": False}, {"text": "a", "label": False}]
    assert rejections_of(tmp_path / "a.jsonl", *records) == {}
    judged = {"prompt": "Q", "completion": "A", "label": False}
    assert rejections_of(tmp_path / "a.jsonl", judged) == {1: "preference_data"}
