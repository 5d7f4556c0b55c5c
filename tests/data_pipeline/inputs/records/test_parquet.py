"""Parquet tables: columns of text and media, conversations, and damaged files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Media, NotRead
from data_pipeline.inputs.records.parquet import Parquet
from tests.data_pipeline.inputs.reading import JPEG, MP4, PNG, opened, read

pytestmark = pytest.mark.fast


def repr_type(value: Any) -> str:
    return "-".join(value) if isinstance(value, dict) else type(value).__name__


def write_parquet(path: Path, rows: list[Any], **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2, **options)
    return path


def test_hugging_face_table_becomes_image_text(tmp_path):
    (tmp_path / "side.jpg").write_bytes(JPEG)
    rows = [
        {"image": {"bytes": JPEG, "path": None}, "caption": "A cat.", "score": 0.5, "raw": b"x"},
        {"image": {"bytes": None, "path": "side.jpg"}, "caption": "A dog.", "score": None, "raw": b"x"},
        {"image": {"bytes": None, "path": None}, "caption": "Nothing.", "score": 1.0, "raw": b"x"},
        {"image": {"bytes": b"not an image", "path": "a.dat"}, "caption": "Noise.", "score": 1.0, "raw": b"x"},
        {"image": {"bytes": MP4, "path": None}, "caption": "A video.", "score": 1.0, "raw": b"x"},
        {"image": None, "caption": "Words.", "score": None, "raw": b"x"},
    ]
    given = opened(write_parquet(tmp_path / "a.parquet", rows))
    assert len(given.units()) == 3
    drafts, rejected = read(given)
    assert [draft.record for draft in drafts] == [
        {"domain": "image_text", "text": "A cat.", "score": 0.5},
        {"domain": "image_text", "text": "A dog."},
    ]
    assert [draft.images for draft in drafts] == [[Media("jpg", JPEG)]] * 2
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.parquet:3", "missing_file"),
        ("a.parquet:4", "unknown_extension"),
        ("a.parquet:5", "unknown_extension"),
        ("a.parquet:6", "missing_file"),
    ]
    drafts, _ = read(opened(tmp_path / "a.parquet", settings=["domain=text"]))
    assert drafts[-1].record == {"domain": "text", "text": "Words."}


def test_list_of_images_becomes_one_sample(tmp_path):
    rows = [{"images": [JPEG, PNG], "text": "<image> and <image>", "domain": "interleaved"}]
    [draft], _ = read(opened(write_parquet(tmp_path / "lists.parquet", rows)))
    assert draft.images == [Media("jpg", JPEG), Media("png", PNG)]
    assert draft.record == {"domain": "interleaved", "text": "<image> and <image>"}


def test_columns_are_read_as_named_by_the_user(tmp_path):
    path = write_parquet(tmp_path / "named.parquet", [{"left": JPEG, "right": PNG, "words": "two", "film": MP4}])
    given = opened(path, settings=["text=words", "image=right,left", "video=film", "domain=interleaved"])
    [draft], _ = read(given)
    assert [*draft.images, *draft.videos] == [Media("png", PNG), Media("jpg", JPEG), Media("mp4", MP4)]


def test_conversation_in_a_table_gets_its_images(tmp_path):
    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    [draft], _ = read(opened(write_parquet(tmp_path / "chat.parquet", [{"messages": turns, "images": [PNG]}])))
    assert draft.record["messages"][0]["content"] == "<image>What?"
    assert draft.images == [Media("png", PNG)]


def test_row_that_python_cannot_represent_is_rejected_alone(tmp_path):
    texts = pa.array([b"one", b"\xff\xfe", b"three", b"four"])
    columns = {
        "text": pa.Array.from_buffers(pa.string(), len(texts), texts.buffers()),
        "at": pa.array([1, 2, 2**62, 3], pa.timestamp("us")),
        "made": pa.array([1_000_000_007] * 4, pa.timestamp("ns", "UTC")),
        "took": pa.array([1007] * 4, pa.duration("ns")),
        "raw": pa.array([b"x"] * 4).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    drafts, rejected = read(opened(tmp_path / "a.parquet", settings=["domain=text"]))
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.parquet:2", "bad_record"),
        ("a.parquet:3", "bad_record"),
    ]
    times = {"made": "1970-01-01 00:00:01+00:00", "took": "0:00:00.000001"}
    assert [draft.record for draft in drafts] == [
        {"domain": "text", "text": "one", "at": "1970-01-01 00:00:00.000001", **times},
        {"domain": "text", "text": "four", "at": "1970-01-01 00:00:00.000003", **times},
    ]


IMAGE = {"bytes": JPEG, "path": None}


def not_read_of(given) -> dict[str, int]:
    found = [entry for unit in given.units() for entry in given.read(unit)]
    names: Counter[str] = Counter()
    for entry in found:
        names.update({entry.name: entry.count} if isinstance(entry, NotRead) else getattr(entry, "not_read", {}))
    return dict(names)


NAMES = "img jpeg jpg png Image Images screenshot page_image photo image_1 IMAGE pic whatever figure_png left"


@pytest.mark.parametrize("value", [IMAGE, JPEG, [IMAGE], [JPEG], {"data": JPEG, "name": "a.jpg"}], ids=repr_type)
@pytest.mark.parametrize("name", ["picture", *NAMES.split()])
def test_image_column_is_found_by_its_content(tmp_path, name, value):
    rows = [{name: value, "text": f"A cat {number}."} for number in range(3)]
    drafts, rejected = read(opened(write_parquet(tmp_path / "a.parquet", rows)))
    assert not rejected
    assert [draft.record for draft in drafts] == [
        {"domain": "image_text", "text": f"A cat {number}."} for number in range(3)
    ]
    assert [draft.images for draft in drafts] == [[Media("jpg", JPEG)]] * 3
    assert drafts[0].read_as == {f"column {name}": "images"}


@pytest.mark.parametrize("name", ["clip", "mp4", "recording", "video_1"])
def test_video_column_is_found_by_its_content(tmp_path, name):
    [draft], _ = read(opened(write_parquet(tmp_path / "a.parquet", [{name: MP4, "caption": "A dog."}])))
    assert draft.record == {"domain": "video", "text": "A dog."}
    assert draft.videos == [Media("mp4", MP4)]


def test_hugging_face_declares_what_empty_first_rows_do_not_show(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"scan": pa.array([None] * 2000 + [IMAGE], kind), "text": ["x"] * 2001}
    features = {"scan": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    drafts, rejected = read(opened(path))
    assert (len(drafts), len(rejected)) == (1, 2000)
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=r"'scan' may hold images, .*--set image=scan, or --set domain=text"):
        opened(path).units()
    features["scan"]["_type"] = "Audio"
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    given = opened(path)
    assert len(read(given)[0]) == 2001
    assert not_read_of(given) == {"column scan (struct with bytes)": 2001}


@pytest.mark.parametrize("names", [["image_2", "image_10", "image_1"], ["right", "left"]])
def test_numbered_images_are_used_in_their_order(tmp_path, names):
    files = {"image_1": JPEG, "image_2": PNG, "image_10": JPEG, "left": JPEG, "right": PNG}
    [draft], _ = read(opened(write_parquet(tmp_path / "a.parquet", [{n: files[n] for n in names} | {"text": "Look."}])))
    ordered = ["image_1", "image_2", "image_10"] if len(names) == 3 else ["left", "right"]
    assert [image.data for image in draft.images] == [files[name] for name in ordered]
    assert draft.record == {"domain": "interleaved", "text": "<image>" * len(names) + "Look."}


def test_every_column_with_bytes_has_a_name(tmp_path):
    row = {
        "image": IMAGE,
        "text": "x",
        "raw": b"x",
        "meta": {"thumb": IMAGE, "size": 3},
        "parts": [b"x"],
        "sound": {"bytes": b"RIFFxxxxWAVE", "path": "a.wav"},
    }
    given = opened(write_parquet(tmp_path / "a.parquet", [row] * 5))
    assert len(read(given)[0]) == 5
    assert not_read_of(given) == {
        "column raw (binary)": 5,
        "column meta (struct with bytes)": 5,
        "column parts (list with bytes)": 5,
        "column sound (struct with bytes)": 5,
    }
    given = opened(write_parquet(tmp_path / "a.parquet", [row] * 5), settings=["domain=text"])
    assert read(given)[0][0].record == {"domain": "text", "text": "x"}
    assert not_read_of(given)["column image (struct with bytes)"] == 5


def test_question_sets_become_conversations(tmp_path):
    pairs = [{"user": "Who?", "assistant": "Me.", "source": "s"}, {"user": "Why?", "assistant": "So.", "source": "s"}]
    rows: list[Any] = [
        {"images": [IMAGE, {"bytes": PNG, "path": None}], "texts": pairs, "ratings": [3, 4]},
        {"images": None, "texts": pairs[:1], "ratings": None},
    ]
    drafts, rejected = read(opened(write_parquet(tmp_path / "a.parquet", rows)))
    assert not rejected
    turns = drafts[0].record["messages"]
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "<image><image>Who?"),
        ("assistant", "Me."),
        ("user", "Why?"),
        ("assistant", "So."),
    ]
    assert (drafts[0].record["domain"], drafts[0].record["ratings"]) == ("chat", [3, 4])
    assert drafts[0].images == [Media("jpg", JPEG), Media("png", PNG)]
    assert (len(drafts[1].images), drafts[1].record["messages"][0]["content"]) == (0, "Who?")
    [draft], _ = read(opened(write_parquet(tmp_path / "i.parquet", [{"instruction": "Who?", "output": "Me."}])))
    assert [turn["content"] for turn in draft.record["messages"]] == ["Who?", "Me."]
    row = {"image": IMAGE, "question": "Who?", "answer": "Me.", "question_id": 3}
    [draft], _ = read(opened(write_parquet(tmp_path / "b.parquet", [row])))
    assert [turn["content"] for turn in draft.record["messages"]] == ["<image>Who?", "Me."]
    assert draft.record["question_id"] == 3


def test_documents_of_obelics_and_mmc4_are_read(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(JPEG)
    text = "A cat\n\n<image>\n\nand a dog."
    for images in ([None, IMAGE, None], [None, "cat.jpg", None], [None, JPEG, None]):
        row: dict[str, Any] = {"images": images, "texts": ["A cat", None, "and a dog."], "metadata": "[]"}
        [draft], _ = read(opened(write_parquet(tmp_path / "a.parquet", [row])))
        assert draft.record == {"domain": "interleaved", "text": text, "metadata": "[]"}
        assert draft.images == [Media("jpg", JPEG)]
    info = [{"image_name": "cat.jpg", "matched_text_index": 1, "raw_url": "http://x"}]
    row = {"text_list": ["A cat", "and a dog."], "image_info": info, "url": "http://x"}
    [draft], _ = read(opened(write_parquet(tmp_path / "m.parquet", [row])))
    assert (draft.record["text"], draft.images) == (text, [Media("jpg", JPEG)])
    row = {"images": [None, "https://x/a.jpg", None], "texts": ["A cat", None, "and a dog."]}
    path = write_parquet(tmp_path / "u.parquet", [row])
    with pytest.raises(DataError, match=r"column 'images' holds URLs, .*img2dataset"):
        opened(path).units()
    [draft], _ = read(opened(path, settings=["domain=text"]))
    assert draft.record["text"] == "A cat\n\nand a dog."


def test_list_of_captions_becomes_samples(tmp_path):
    rows = [{"image": IMAGE, "caption": ["One.", "Two."], "filename": "1.jpg"}] * 3  # as Flickr30k
    path = write_parquet(tmp_path / "a.parquet", rows)
    drafts, _ = read(opened(path))
    assert [draft.record["text"] for draft in drafts] == ["One.", "Two."] * 3
    assert drafts[1].record == {"domain": "image_text", "text": "Two.", "filename": "1.jpg"}
    given = opened(path, settings=["captions=first"])
    assert [draft.record["text"] for draft in read(given)[0]] == ["One."] * 3
    assert not_read_of(given) == {"caption not chosen": 3}


def test_page_of_the_web_is_a_text_and_table_without_rows_has_a_name(tmp_path):
    row = {"text": "A page.", "id": "1", "dump": "CC", "url": "https://a.b/c", "token_count": 3}  # FineWeb
    write_parquet(tmp_path / "a.parquet", [row])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "b.parquet")
    given = opened(tmp_path)
    [draft], _ = read(given)
    assert draft.record == {"domain": "text", **row}
    assert not_read_of(given) == {"table without rows": 1}


def test_conversation_with_the_domain_of_texts_is_rejected(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"messages": [{"role": "user", "content": "x"}], "images": [IMAGE]}])
    _, [rejected] = read(opened(path, settings=["domain=image_text"]))
    assert "a conversation has domain chat" in rejected.detail


def test_column_of_urls_is_kept_in_texts(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "A page.", "url": "http://x"}])
    [draft], _ = read(opened(path, settings=["domain=text"]))
    assert draft.record == {"domain": "text", "text": "A page.", "url": "http://x"}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"url": "http://x/a.jpg", "caption": "x"}, [], "column 'url' holds URLs, .*img2dataset.* domain=text"),
        ({"URL": "http://x/a.jpg", "TEXT": "x"}, ["text=TEXT"], "column 'URL' holds URLs"),
        ({"words": "x", "image": JPEG}, [], "which column is the text.* --set text=NAME; its columns are words, image"),
        ({"text": "x", "image": JPEG}, ["image=photo"], "has no column 'photo'"),
        ({"text": "x", "image": JPEG, "mask": PNG}, [], "columns image and mask .* --set image=image,mask"),
        ({"text": "x", "clip": MP4, "video": MP4}, [], "columns clip and video .* --set video=clip,video"),
        ({"caption": "x", "recaption": "y", "image": JPEG}, [], "caption and recaption .* --set text=caption"),
        ({"caption": "x", "text": "y", "image": JPEG}, [], "caption and text .* --set text=caption"),
        ({"prompt": "x", "answers": "y", "image": JPEG}, [], "prompt and answers .* --set text=prompt"),
        ({"text": "x", "messages": []}, [], "--set domain=chat.*--set text=text"),
        (
            {"caption": "x", "label": 3},
            [],
            "'caption' holds captions, but of what.* --set image=NAME, or --set domain=text",
        ),
        ({"text": "x", "pic_of_it": "a.jpg"}, [], "'pic_of_it' names images: --set image=pic_of_it"),
        ({"text": "x", "image": 7}, [], "'image' is called like images, .* --set image=NAME, .* --set domain=text"),
        ({"image": "http://x/a", "caption": "x"}, [], "column 'image' holds URLs"),
        ({"messages": [{"role": "user", "content": [{"image": JPEG}]}]}, [], "'messages' has bytes in it"),
    ],
)
def test_table_without_usable_columns_is_refused(tmp_path, row, settings, message):
    with pytest.raises(DataError, match=message):
        opened(write_parquet(tmp_path / "a.parquet", [row]), settings=settings).units()


def test_damaged_row_group_is_rejected_alone(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x" * 500 + str(n)} for n in range(6)], compression="snappy")
    about = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = about.dictionary_page_offset or about.data_page_offset
    data[start : start + about.total_compressed_size] = b"\xff" * about.total_compressed_size
    path.write_bytes(data)
    drafts, rejected = read(Parquet((str(path),)))
    assert len(drafts) == 4
    assert [(entry.origin, entry.reason) for entry in rejected] == [("a.parquet:3", "damaged_file")]
    path.write_bytes(data[:100])
    with pytest.raises(DataError, match="is not a Parquet file"):
        Parquet((str(path),)).units()


def test_alpaca_with_its_whole_prompt_is_a_chat_as_in_json(tmp_path):
    row = {"instruction": "Who?", "input": "", "output": "Me.", "text": "Below is an instruction. Who? Me."}
    [draft], _ = read(opened(write_parquet(tmp_path / "a.parquet", [row])))
    assert (draft.record["domain"], draft.record["messages"][1]["content"]) == ("chat", "Me.")
    assert draft.not_read == {"field text": 1}


def test_questions_about_images_by_url_are_refused(tmp_path):
    row = {"question": "Who?", "answer": "Me.", "image_url": "http://x/1.jpg"}
    path = write_parquet(tmp_path / "a.parquet", [row])
    with pytest.raises(DataError, match=r"image_url.*--set domain=chat"):
        opened(path).units()
    [draft], _ = read(opened(path, settings=["domain=chat"]))
    assert draft.record["domain"] == "chat"
