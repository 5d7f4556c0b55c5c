"""Records to samples."""

from __future__ import annotations

import pytest

from data_pipeline.domains import DOMAINS, build_sample
from data_pipeline.errors import BadSample
from data_pipeline.sample import Image, Text, Token, Video

pytestmark = pytest.mark.fast

BEGIN = (Token("[gMASK]"), Token("<sop>"))
END = Token("<|endoftext|>", loss=True)


@pytest.mark.parametrize(
    ("domain", "text", "images", "videos", "content"),
    [
        ("image_text", "A cat.", 1, 0, (Image(), Text("A cat.", True))),
        ("ocr", "INVOICE <image>", 1, 0, (Image(), Text("INVOICE <image>", True))),
        ("video", "A dog runs.", 0, 1, (Video(), Text("A dog runs.", True))),
        ("text", "Just <image> text.", 0, 0, (Text("Just <image> text.", True),)),
        ("interleaved", "a <image><video> b", 1, 1, (Text("a ", True), Image(), Video(), Text(" b", True))),
        ("grounding", "<image>cat [[1,2,3,4]]", 1, 0, (Image(), Text("cat [[1,2,3,4]]", True))),
    ],
)
def test_documents_become_elements_in_order(domain, text, images, videos, content):
    sample = build_sample({"domain": domain, "text": text, "url": "a/b"}, images=images, videos=videos)
    assert sample.elements == (*BEGIN, *content, END)
    assert sample.domain == domain


def test_domains_are_all_listed():
    assert set(DOMAINS) == {"image_text", "interleaved", "ocr", "grounding", "video", "text", "chat", "rl"}


@pytest.mark.parametrize(
    ("record", "images", "videos", "reason", "says"),
    [
        ({"domain": "interleaved", "text": "<image> <image>"}, 1, 0, "media_mismatch", "2 images but 1 are given"),
        ({"domain": "interleaved", "text": "x"}, 1, 0, "media_mismatch", "0 images but 1 are given"),
        ({"domain": "interleaved", "text": "<video>"}, 0, 0, "media_mismatch", "1 videos but 0 are given"),
        ({"domain": "image_text", "text": "x"}, 0, 0, "media_mismatch", "1 images but 0 are given"),
        ({"domain": "text"}, 0, 0, "bad_record", '"text"'),
        ({"domain": "text", "text": ["x"]}, 0, 0, "bad_record", '"text"'),
        ({"domain": "images", "text": "x"}, 0, 0, "unknown_domain", "'images': use one of image_text"),
        ({"text": "x"}, 0, 0, "unknown_domain", "there is no domain: use one of"),
        (["x"], 0, 0, "unknown_domain", "there is no domain: use one of"),
    ],
)
def test_bad_records_have_a_reason(record, images, videos, reason, says):
    with pytest.raises(BadSample) as caught:
        build_sample(record, images=images, videos=videos)
    assert caught.value.reason == reason
    assert says in caught.value.detail
