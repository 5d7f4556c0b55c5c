"""Folders of images or videos with captions beside them; also a single image or video.

    cats/1.jpg  cats/1.txt            the caption, or a whole record in cats/1.json
    cats/metadata.jsonl               {"file_name": "1.jpg", "text": "A cat."}, as in Hugging Face's imagefolder
    cats/metadata.csv                 file_name,text

An image without a caption is rejected as `no_caption`, a caption without its file as `missing_file`.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import ONE_FILE, Draft, Rejected, Unit
from data_pipeline.inputs.media import (
    CAPTION_FIELDS,
    as_media,
    guess_domain,
    has_media_name,
    is_media,
    read_head,
    read_whole,
)
from data_pipeline.inputs.names import as_stored, beside, files_below, shown_names
from data_pipeline.inputs.records.jsonl import parse_json

UNIT_BYTES = 4 << 20
METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_SUFFIXES = (".txt", ".json")
_TIMED = (".srt", ".vtt")  # captions that the kind `clips` reads
_CONVERTIBLE = ("heic", "heif", "svg", "psd", "pdf")  # images that another program can convert to JPEG or PNG
_OTHER_KINDS = ("jsonl", "parquet", "tar", "pptx", "html", "htm", "md")  # files that another kind reads


@dataclass(frozen=True)
class Folder:
    """Images and videos with captions. A unit is a range of files in the order of their paths.

    The last unit of a folder also has its metadata files, and the captions whose files do not exist.
    """

    paths: tuple[str, ...]  # folders, or single images and videos
    domain: str = ""  # of records that name none, e.g. ocr; empty: image_text for images, video for videos
    allow_outside: bool = False  # accept files outside the folder

    def units(self) -> Sequence[Unit]:
        """Return the units of all paths; `extra` has the names and sizes of their files."""
        _metadata.cache_clear()  # the files may have changed
        units = [unit for path in self.paths for unit in _units(path)]
        if not units:
            raise DataError(f"{', '.join(self.paths)}: it holds no image and no video")
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the images and videos, and the captions without them."""
        return {"files": len(unit.extra["files"]) + len(unit.extra.get("alone", ()))}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield one sample per file."""
        shown = shown_names(self.paths)[unit.path]
        is_file = Path(unit.path).is_file()
        root = Path(unit.path).parent if is_file else Path(unit.path)
        for name in unit.extra["files"]:
            origin = shown if is_file else f"{shown}/{name}"
            try:
                yield replace(self._draft(root, name, origin), items=ONE_FILE)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail, ONE_FILE)
        for name in unit.extra.get("alone", ()):
            detail = "a caption without an image or video of its name"
            yield Rejected(f"{shown}/{name}", "missing_file", detail, ONE_FILE)
        for name in unit.extra.get("metadata", ()):
            metadata = _metadata(unit.path, name, self.allow_outside)
            yield from (Rejected(f"{shown}/{name}", "bad_record", detail) for detail in metadata.damaged)
            for file in sorted(metadata.rows):
                if not os.path.isfile(as_stored(str(Path(unit.path, name).parent / file))):
                    yield Rejected(f"{shown}/{name}", "missing_file", f"{file}: named here, but it does not exist")

    def _draft(self, root: Path, name: str, origin: str) -> Draft:
        extension = Path(name).suffix.lower().lstrip(".")
        if not has_media_name(name) and not is_media(read_head(root / name)):
            raise BadSample("unknown_extension", f"not a supported image or video: .{extension}{_fix(extension)}")
        record = self._caption(root, name)
        field, media = as_media(read_whole(name, root, allow_outside=self.allow_outside), name)
        if "domain" not in record:
            domain = self.domain or guess_domain(int(field == "images"), int(field == "videos"))
            record = {"domain": domain, **record}
        return Draft(record, **{field: [media]}, origin=origin)

    def _caption(self, root: Path, name: str) -> dict[str, Any]:
        """Return the record of a file from NAME.txt, NAME.json or the nearest metadata file at or above it."""
        if (found := beside(root / name, _CAPTION_SUFFIXES)) is not None:
            file = found.relative_to(root).as_posix()
            data = read_whole(file, root, allow_outside=self.allow_outside)
            if found.suffix.lower() == ".txt":
                return _with_text({"text": _decode(data, file)})
            content = parse_json(data)
            if not isinstance(content, dict):
                raise BadSample("bad_record", f"{file} is not a JSON object")
            return _with_text(content)
        for folder in PurePosixPath(name).parents:
            below = _composed(str(PurePosixPath(name).relative_to(folder)))
            for metadata in METADATA:
                if (root / folder / metadata).is_file():
                    rows = _metadata(str(root), str(folder / metadata), self.allow_outside).rows
                    if below in rows:
                        return _with_text(rows[below])
        timed = beside(root / name, _TIMED)
        hint = f"; {timed.relative_to(root).as_posix()} is read with --kind clips" if timed is not None else ""
        text, record = (PurePosixPath(name).with_suffix(suffix) for suffix in _CAPTION_SUFFIXES)
        raise BadSample("no_caption", f"no {text}, no {record} and no line in {' or '.join(METADATA)}{hint}")


def _units(root: str) -> Iterator[Unit]:
    if Path(root).is_file():
        size = os.path.getsize(root)
        yield Unit(root, bytes=size, extra={"files": [Path(root).name], "sizes": [size]})
        return
    files: list[str] = []
    metadata: list[str] = []
    captions: dict[str, str] = {}  # path without suffix (_composed) -> path
    captioned: set[str] = set()  # paths of media without suffix (_composed)
    sizes: list[int] = []
    total = 0
    for name, size in _walk(root):
        path = PurePosixPath(name)
        if path.name in METADATA:
            metadata.append(name)
        elif path.suffix.lower() in _CAPTION_SUFFIXES:
            captions[_composed(str(path.with_suffix("")))] = name
        else:
            captioned.add(_composed(str(path.with_suffix(""))))
            files.append(name)
            sizes.append(size)
            total += size
            if total >= UNIT_BYTES:
                yield Unit(root, bytes=total, extra={"files": files, "sizes": sizes})
                files, sizes, total = [], [], 0
    alone = [name for stem, name in captions.items() if stem not in captioned]
    if files or metadata or (alone and captioned):
        # A changed caption changes these checksums, so that the build is not resumed with it.
        checksums = [zlib.crc32(Path(root, name).read_bytes()) for name in metadata]
        extra = {"files": files, "sizes": sizes, "metadata": metadata, "alone": alone, "checksums": checksums}
        yield Unit(root, bytes=total, extra=extra)


def _walk(root: str) -> list[tuple[str, int]]:
    """Return (path below root, size in bytes) of every file that is not hidden, sorted by path."""
    return sorted((file.relative_to(root).as_posix(), file.lstat().st_size) for file in files_below(Path(root)))


def _with_text(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with its text moved to the field `text` from any of CAPTION_FIELDS."""
    if "messages" in record:
        return record
    for field in CAPTION_FIELDS:
        if isinstance(record.get(field), str) and record[field].strip():
            return {"text": record[field], **{key: value for key, value in record.items() if key != field}}
    raise BadSample("no_caption", f"the caption is empty: put it in {' or '.join(CAPTION_FIELDS)}")


@dataclass(frozen=True)
class _Metadata:
    """Content of a metadata file."""

    rows: dict[str, dict[str, Any]]  # name of a media file (_composed) -> its record
    damaged: list[str]  # what is wrong with each line that cannot be used


@lru_cache(maxsize=8)
def _metadata(root: str, name: str, allow_outside: bool) -> _Metadata:
    try:
        content = _decode(read_whole(name, Path(root), allow_outside=allow_outside), name)
        lines = (_csv_lines if name.endswith(".csv") else _json_lines)(content)
    except (BadSample, csv.Error) as error:
        return _Metadata({}, [str(error)])
    metadata = _Metadata({}, [])
    for number, row in lines:
        file = row.get("file_name") if isinstance(row, dict) else None
        if isinstance(file, str) and file:
            kept = {key: value for key, value in row.items() if isinstance(key, str) and value is not None}
            metadata.rows[_composed(PurePosixPath(kept.pop("file_name")).as_posix())] = kept
        else:
            metadata.damaged.append(f'line {number} is not a record with a "file_name"')
    return metadata


def _composed(name: str) -> str:
    """Return a file name in NFC, so that names compare equal however their accents are spelled (names.as_stored)."""
    return unicodedata.normalize("NFC", name)


def _csv_lines(content: str) -> list[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(content))
    return [(reader.line_num, row) for row in reader]


def _json_lines(content: str) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, parse_json(line.encode())))
            except BadSample:
                rows.append((number, None))
    return rows


def _fix(extension: str) -> str:
    """Return what a user can do about a file that is not supported, in parentheses, or an empty string."""
    if extension in _CONVERTIBLE:
        return " (convert it to JPEG or PNG)"
    return " (give the file itself with --input)" if extension in _OTHER_KINDS else ""


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"{name}: byte {error.start} is not UTF-8: convert the file with iconv") from error
