"""How the record of each domain (KEY.json in a shard) becomes a `Sample`.

    image_text, ocr         {"text": caption}                          one image, then its text
    video                   {"text": caption}                          one video, then its text
    interleaved, grounding  {"text": "... <image> ... <video> ..."}    images and videos at their placeholders
    text                    {"text": document}
    chat                    {"messages": [...], "thinking": bool, "tools": [...]}    see chat.py
    rl                      {"messages": [...], "reference": ..., "verifier": ...}   a prompt, see rl_record.py

Domains differ in how samples are built, not in how they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_pipeline.domains import chat, documents
from data_pipeline.domains.rl_record import read_rl_record
from data_pipeline.errors import BadSample
from data_pipeline.sample import Element, Image, Sample, Video

_DOCUMENTS: dict[str, Callable[[str], list[Element]]] = {
    "image_text": documents.image_then_text,
    "ocr": documents.image_then_text,
    "video": documents.video_then_text,
    "interleaved": documents.text_with_placeholders,
    "grounding": documents.text_with_placeholders,
    "text": documents.plain_text,
}
_CHATS = {"chat": chat.render, "rl": chat.render_prompt}
DOMAINS = (*_DOCUMENTS, *_CHATS)


def build_sample(record: dict[str, Any], *, images: int, videos: int, chat_form: str = chat.DEFAULT_FORM) -> Sample:
    """Build the Sample of a record.

    Args:
        record: The content of KEY.json.
        images: The number of images that come with it.
        videos: The number of videos that come with it.
        chat_form: How chats are written, one of chat.CHAT_FORMS.

    Raises:
        BadSample: The record cannot be used, or its text stands for another number of images or videos.
    """
    domain = record.get("domain") if isinstance(record, dict) else None
    if isinstance(domain, str) and domain in _CHATS:
        render = _CHATS[domain]
        elements = render(record.get("messages"), record.get("thinking"), tools=record.get("tools"), form=chat_form)
        if domain == "rl":
            read_rl_record(record)
    elif isinstance(domain, str) and domain in _DOCUMENTS:
        if not isinstance(record.get("text"), str) or not record["text"]:
            raise BadSample("bad_record", f'a record of domain {domain!r} needs a non-empty "text"')
        elements = documents.document(_DOCUMENTS[domain](record["text"]))
    else:
        problem = "there is no domain" if domain is None else f'"domain" is {str(domain)[:40]!r}'
        converts = ". `python -m tools.shard build --input` converts records of other tools" if domain is None else ""
        raise BadSample("unknown_domain", f"{problem}: use one of {', '.join(DOMAINS)}{converts}")

    sample = Sample(domain, tuple(elements))
    for kind, given, word in ((Image, images, "image"), (Video, videos, "video")):
        if sample.count(kind) != given:
            raise BadSample("media_mismatch", f"the text stands for {sample.count(kind)} {word}s but {given} are given")
    return sample
