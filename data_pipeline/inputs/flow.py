"""A document on its way to an interleaved sample: what a reader meets, in the order in which it is met.

["A cat", Media("png", ...), "and a dog."]  ->  {"domain": "interleaved", "text": "A cat ... <image> ... and a dog."}
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Draft, Media, Unit
from data_pipeline.inputs.media import read_whole
from data_pipeline.media.images import probe_image

Block = str | Media  # a paragraph or a picture
IMAGE_PLACEHOLDER = "<image>"
_PLACEHOLDER = re.compile(r"<(image|video)>")
# By what Pillow finds: the names and MIME types that documents give are often wrong.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


def flow_draft(blocks: Sequence[Block], origin: str, **fields: object) -> Draft:
    """Paragraphs and pictures -> an interleaved draft. fields: further keys of the record.

    Raises BadSample `empty_document` if there is neither text nor a picture.
    """
    parts = [IMAGE_PLACEHOLDER if isinstance(block, Media) else literal(block.strip("\n")) for block in blocks]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise BadSample("empty_document", "there is neither text nor a picture in it")
    images = [block for block in blocks if isinstance(block, Media)]
    return Draft({"domain": "interleaved", "text": text, **fields}, images=images, origin=origin)


def literal(text: str) -> str:
    """Text in which nothing stands for a picture or a clip: a paper that writes <image> gets < image >."""
    return _PLACEHOLDER.sub(r"< \1 >", text)


def picture(data: bytes) -> Media:
    """A picture's bytes with the extension of what they are. Raises BadSample: unreadable_image, image_too_large,
    unknown_extension (a format that shards do not hold)."""
    probe_image(data)
    format = Image.open(io.BytesIO(data)).format or ""
    if format not in _EXTENSIONS:
        raise BadSample("unknown_extension", f"a {format} picture: shards hold {', '.join(_EXTENSIONS)}")
    return Media(_EXTENSIONS[format], data)


def file_units(paths: Sequence[str]) -> list[Unit]:
    """One unit for every file."""
    return [Unit(path, bytes=Path(path).stat().st_size) for path in paths]


def read_document(path: str) -> bytes:
    """The bytes of a file that was given itself. Raises BadSample `missing_file`."""
    return read_whole(Path(path).name, Path(path).parent, allow_outside=True)


def read_text(path: str) -> str:
    """A UTF-8 file, with or without its mark, line ends as \\n. Raises BadSample `not_utf8`."""
    try:
        text = read_document(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"byte {error.start} is not UTF-8: convert the file with iconv") from error
    if "\0" in text:
        raise BadSample("not_utf8", "it holds zero bytes: it is no text, or one in UTF-16")
    return text.replace("\r\n", "\n").replace("\r", "\n")
