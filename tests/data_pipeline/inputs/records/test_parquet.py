"""Parquet tables: columns of text and media, conversations, and damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.records.parquet import Parquet
from tests.data_pipeline.inputs.reading import JPEG, MP4, PNG, opened, read

pytestmark = pytest.mark.fast


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
        (
            {"text": "x", "photo": {"bytes": JPEG, "path": None}},
            [],
            "column 'photo' holds bytes: .*image=NAME.*domain=text",
        ),
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
