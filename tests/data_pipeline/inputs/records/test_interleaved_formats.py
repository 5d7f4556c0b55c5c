"""Interleaved documents in the formats of public collections."""

from __future__ import annotations

import pytest

from data_pipeline.errors import BadSample
from data_pipeline.inputs.records.interleaved_formats import is_foreign_interleaved, normalise

pytestmark = pytest.mark.fast


def test_obelics_and_mmc4_give_the_same_document():
    obelics = {
        "texts": ["A cat", None, "and <image> a dog.", None],
        "images": [None, "a.jpg", None, "b.jpg"],
        "url": "u",
    }
    mmc4 = {
        "text_list": ["A cat", "and <image> a dog.", ""],
        "image_info": [
            {"image_name": "a.jpg", "matched_text_index": 1},
            {"image_name": "b.jpg", "matched_text_index": 2},
        ],
        "url": "u",
    }
    for record in (obelics, mmc4):
        assert is_foreign_interleaved(record)
        assert normalise(record) == {
            "domain": "interleaved",
            "text": "A cat\n\n<image>\n\nand < image > a dog.\n\n<image>",
            "images": ["a.jpg", "b.jpg"],
            "url": "u",
        }
    assert not is_foreign_interleaved({"domain": "interleaved", "text": "x"})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"texts": ["a"], "images": []}, "bad_record"),
        ({"texts": "a", "images": ["b"]}, "bad_record"),
        ({"texts": [None], "images": [None]}, "empty_document"),
        ({"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": 1}]}, "bad_record"),
        ({"text_list": [], "image_info": []}, "empty_document"),
    ],
)
def test_bad_document_is_rejected(record, reason):
    with pytest.raises(BadSample) as caught:
        normalise(record)
    assert caught.value.reason == reason
