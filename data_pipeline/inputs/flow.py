"""Documents as interleaved samples: a reader collects paragraphs and images in reading order.

["A cat", Media("png", ...), "and a dog."]  ->  {"domain": "interleaved", "text": "A cat ... <image> ... and a dog."}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Draft, Media, Unit
from data_pipeline.inputs.media import as_media, read_whole
from data_pipeline.media.file_types import describe
from data_pipeline.media.image_files import probe_image

Block = str | Media  # a paragraph or an image
IMAGE_PLACEHOLDER = "<image>"
_PLACEHOLDER = re.compile(r"<(image|video)>")


def flow_draft(blocks: Sequence[Block], origin: str, **fields: object) -> Draft:
    """Build an interleaved draft of paragraphs and images.

    Args:
        blocks: Paragraphs and images in reading order.
        origin: Where the document comes from.
        **fields: Further fields of the record.

    Raises:
        BadSample: empty_document, if there is neither text nor an image.
    """
    parts = [
        IMAGE_PLACEHOLDER if isinstance(block, Media) else escape_placeholders(block.strip("\n")) for block in blocks
    ]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise BadSample("empty_document", "it has neither text nor images")
    images = [block for block in blocks if isinstance(block, Media)]
    return Draft({"domain": "interleaved", "text": text, **fields}, images=images, origin=origin)


def escape_placeholders(text: str) -> str:
    """Return the text with a literal <image> or <video> written as < image > or < video >."""
    return _PLACEHOLDER.sub(r"< \1 >", text)


def image_media(data: bytes) -> Media:
    """Return an image file with the extension of its actual format.

    Raises:
        BadSample: unreadable_image or image_too_large.
    """
    probe_image(data)
    field, media = as_media(data)
    if field != "images":
        raise BadSample("unreadable_image", describe(data))
    return media


def file_units(paths: Sequence[str]) -> list[Unit]:
    """Return one unit per file."""
    return [Unit(path, bytes=Path(path).stat().st_size) for path in paths]


def read_document(path: str) -> bytes:
    """Return the content of a file that the user named as an input.

    Raises:
        BadSample: missing_file or member_too_large.
    """
    return read_whole(Path(path).name, Path(path).parent, allow_outside=True)


def read_text(path: str) -> str:
    r"""Return the text of a UTF-8 file without its byte order mark, lines ended by \n.

    Raises:
        BadSample: not_utf8, missing_file or member_too_large.
    """
    try:
        text = read_document(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"byte {error.start} is not UTF-8: convert the file with iconv") from error
    if "\0" in text:
        raise BadSample("not_utf8", "it contains zero bytes: it is a binary file, or text in UTF-16")
    return text.replace("\r\n", "\n").replace("\r", "\n")
