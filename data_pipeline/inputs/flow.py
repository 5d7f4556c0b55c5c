"""A document on its way to an interleaved sample: what a reader meets, in the order in which it is met.

flow(["A cat", Media("png", ...), "and a dog."])  ->  {"domain": "interleaved", "text": "A cat\\n\\n<image>\\n\\nand a dog."}
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from PIL import Image

from data_pipeline.errors import BadSample, DataError
from data_pipeline.images import probe_image
from data_pipeline.inputs.draft import Draft, Media, Unit

Block = str | Media  # a paragraph or a picture
IMAGE_PLACEHOLDER = "<image>"
# By what the bytes are: names and MIME types of the web are often wrong.
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
_PLACEHOLDER = re.compile(r"<(image|video)>")


def flow_draft(blocks: Sequence[Block], origin: str, **fields: object) -> Draft:
    """Paragraphs and pictures -> an interleaved draft. fields: further keys of the record.

    Raises BadSample `empty_document` if there is neither text nor a picture.
    """
    parts = [IMAGE_PLACEHOLDER if isinstance(block, Media) else literal(block.strip()) for block in blocks]
    text = "\n\n".join(filter(None, parts))
    if not text:
        raise BadSample("empty_document", "there is neither text nor a picture in it")
    images = [block for block in blocks if isinstance(block, Media)]
    return Draft({"domain": "interleaved", "text": text, **fields}, images=images, origin=origin)


def literal(text: str) -> str:
    """Text in which nothing stands for a picture: a paper that writes <image> gets < image >."""
    return _PLACEHOLDER.sub(r"< \1 >", text)


def picture(data: bytes) -> Media:
    """A picture's bytes with the extension of what they are. Raises BadSample: unreadable_image, image_too_large,
    unknown_extension (a format that shards do not hold, SVG for one)."""
    probe_image(data)
    format = Image.open(io.BytesIO(data)).format or ""
    if format not in _EXTENSIONS:
        raise BadSample("unknown_extension", f"a {format} picture: shards hold {', '.join(_EXTENSIONS)}")
    return Media(_EXTENSIONS[format], data)


# --- files and what documents refer to --------------------------------------------------------------------------------


def file_units(path: Path, suffixes: Iterable[str]) -> list[Unit]:
    """One unit for every file: the file itself, or those of a folder and its subfolders that end in one of the
    suffixes, by name; hidden ones are passed over. Raises DataError if there is none."""
    if path.is_file():
        return [Unit(str(path), bytes=path.stat().st_size)]
    if not path.is_dir():
        raise DataError(f"{path} does not exist: give a file or a folder")
    wanted = tuple(suffixes)
    files = [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in wanted
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not files:
        raise DataError(f"{path} holds no files that end in {' or '.join(wanted)}: give another folder or --kind")
    return [Unit(str(file), bytes=file.stat().st_size) for file in sorted(files)]


def origin_of(unit: Unit, path: Path) -> str:
    """How reports name a unit's file: relative to the folder that was given."""
    return str(Path(unit.path).relative_to(path)) if path.is_dir() else Path(unit.path).name


def read_file(path: Path | str) -> bytes:
    """Raises BadSample `missing_file`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample("missing_file", f"{path}: {error.strerror}") from error


def read_text(path: Path | str) -> str:
    """UTF-8, with or without its mark. Raises BadSample `not_utf8`."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"byte {error.start} is not UTF-8: convert the file with iconv") from error


def referenced(reference: str, *, folder: Path, root: Path) -> bytes:
    """The bytes that a document in `folder` names: a path relative to it (or, beginning with a slash, to root), or a
    data: URI. Nothing is fetched, and nothing outside root is read.

    Raises BadSample: remote_media, outside_folder, missing_file, bad_data_uri.
    """
    reference = reference.strip()
    if reference[:5].lower() == "data:":
        return _data_uri(reference)
    try:
        parts = urlsplit(reference)
    except ValueError as error:
        raise BadSample("remote_media", f"{reference[:200]}: {error}") from error
    if parts.netloc or len(parts.scheme) > 1:  # one letter is a drive of Windows
        raise BadSample("remote_media", f"{reference[:200]}: nothing is fetched; save it beside the document")
    name = unquote(parts.path)
    return read_inside(root, root / name.lstrip("/") if name.startswith("/") else folder / name, name)


def read_inside(root: Path, path: Path, name: str) -> bytes:
    """A file's bytes if it lies below root, links followed. Raises BadSample: outside_folder, missing_file."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError) as error:  # a loop of links, a zero byte
        raise BadSample("missing_file", f"{name[:200]!r}: {error}") from error
    if not inside:
        raise BadSample("outside_folder", f"{name[:200]} lies outside {root}")
    return read_file(path)


def _data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise BadSample("bad_data_uri", f"{uri[:60]} has no comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(re.sub(r"\s", "", unquote(body)), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("bad_data_uri", f"{uri[:60]}...: {error}") from error
