"""Interleaved documents in the formats of public collections, converted to records of the domain `interleaved`.

    OBELICS   {"texts": ["A cat", null, "and a dog."], "images": [null, "cat.jpg", null]}
    MMC4      {"text_list": ["A cat", "and a dog."], "image_info": [{"image_name": "cat.jpg", "matched_text_index": 1}]}

Both become {"domain": "interleaved", "text": "A cat ... <image> ... and a dog.", "images": ["cat.jpg"]}. An image of
MMC4 goes before the sentence that it is matched with.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.flow import IMAGE_PLACEHOLDER, escape_placeholders


def is_foreign_interleaved(record: dict[str, Any]) -> bool:
    """Return whether a record is a document that `normalise` must convert."""
    return "text" not in record and ("texts" in record or "text_list" in record)


def normalise(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a document in one of the formats above to a record of the domain `interleaved`.

    Raises:
        BadSample: bad_record or empty_document.
    """
    if record.get("domain") == "text":
        return _text_alone(record)
    used = {"texts", "images"} if "texts" in record else {"text_list", "image_info"}
    parts = _obelics(record) if "texts" in record else _mmc4(record)
    images = [image for _, image in parts if image is not None]
    blocks = [IMAGE_PLACEHOLDER if image is not None else escape_placeholders(text).strip() for text, image in parts]
    text = "\n\n".join(filter(None, blocks))
    if not text:
        raise BadSample("empty_document", "it has neither text nor images")
    rest = {key: value for key, value in record.items() if key not in used}
    return {**rest, "domain": "interleaved", "text": text, "images": images}


def normalise_with_media(
    record: dict[str, Any], media: dict[str, list[Any]]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Convert a document whose images are values of a table.

    Args:
        record: The document without its images.
        media: Its files, by "images" and "videos"; null where a text stands.

    Returns:
        The record of the domain `interleaved`, and the files in the order of their placeholders.

    Raises:
        BadSample: As `normalise`.
    """
    if "text_list" in record or record.get("domain") == "text":
        record = normalise(record)
        return {key: value for key, value in record.items() if key != "images"}, {**media, "images": record["images"]}
    numbers = [None if image is None else str(number) for number, image in enumerate(media["images"])]
    record = normalise({**record, "images": numbers})
    return record, {**media, "images": [media["images"][int(number)] for number in record.pop("images")]}


def _obelics(record: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Return (text, None) or ("", path of an image) in order."""
    texts, images = record["texts"], record.get("images", [])
    if not _is_list_of(texts, str | None) or not _is_list_of(images, str | None) or len(texts) != len(images):
        raise BadSample("bad_record", '"texts" and "images" must be lists of equal length, of strings or null')
    if any(text and text.strip() and image is not None for text, image in zip(texts, images, strict=True)):
        raise BadSample("bad_record", '"texts" and "images" both have an entry at one place: one of them must be null')
    return [(text or "", image) for text, image in zip(texts, images, strict=True)]


def _mmc4(record: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Return (text, None) or ("", path of an image) in order."""
    sentences, images = record["text_list"], record.get("image_info") or []
    if not _is_list_of(sentences, str) or not _is_list_of(images, dict):
        raise BadSample("bad_record", '"text_list" must be a list of strings, "image_info" of objects')
    before: list[list[str]] = [[] for _ in sentences]
    for image in images:
        name, index = image.get("image_name"), image.get("matched_text_index")
        if not isinstance(name, str) or not isinstance(index, int) or not 0 <= index < len(sentences):
            raise BadSample(
                "bad_record", f"image {str(name)[:80]!r} is matched with sentence {str(index)[:20]} of {len(sentences)}"
            )
        before[index].append(name)
    parts: list[tuple[str, str | None]] = []
    for names, sentence in zip(before, sentences, strict=True):
        parts += [*(("", name) for name in names), (sentence, None)]
    return parts


def _text_alone(record: dict[str, Any]) -> dict[str, Any]:
    """Return the texts of a document as one text. Its images stay in the record as they are named."""
    name = "texts" if "texts" in record else "text_list"
    texts = record[name]
    if not _is_list_of(texts, str | None) or not any(texts):
        raise BadSample("bad_record", f'"{name}" must be a list of texts')
    rest = {("image_names" if key == "images" else key): value for key, value in record.items() if key != name}
    return {**rest, "text": "\n\n".join(text.strip() for text in texts if text and text.strip()), "images": []}


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)
