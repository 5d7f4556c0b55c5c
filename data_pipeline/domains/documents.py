"""Pretraining documents: [gMASK]<sop>, the content with loss on all of its text, <|endoftext|> with loss."""

from __future__ import annotations

import re

from data_pipeline.sample import Element, Image, Text, Token, Video

_PLACEHOLDER = re.compile(r"(<image>|<video>)")
_MEDIA: dict[str, type[Image | Video]] = {"<image>": Image, "<video>": Video}


def document(content: list[Element]) -> list[Element]:
    """Return the elements of a document around its content."""
    return [Token("[gMASK]"), Token("<sop>"), *content, Token("<|endoftext|>", loss=True)]


def image_then_text(text: str) -> list[Element]:
    """Return one image and its text."""
    return [Image(), Text(text, loss=True)]


def video_then_text(text: str) -> list[Element]:
    """Return one video and its text."""
    return [Video(), Text(text, loss=True)]


def plain_text(text: str) -> list[Element]:
    """Return a text in which <image> and <video> are ordinary words."""
    return [Text(text, loss=True)]


def text_with_placeholders(text: str) -> list[Element]:
    """Return a text with images and videos at their placeholders."""
    return split_placeholders(text, loss=True)


def split_placeholders(text: str, *, loss: bool, tags: bool = False) -> list[Element]:
    """Split a text at its <image> and <video> into elements."""
    parts = filter(None, _PLACEHOLDER.split(text))
    return [_MEDIA[part]() if part in _MEDIA else Text(part, loss, tags) for part in parts]
