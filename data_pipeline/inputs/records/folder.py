"""Folders of pictures or clips, each with its caption beside it; also a single such file.

    cats/1.jpg  cats/1.txt            the caption, or a whole record in cats/1.json
    cats/metadata.jsonl               {"file_name": "1.jpg", "text": "A cat."}, as Hugging Face's imagefolder has it
    cats/metadata.csv                 file_name,text

A picture without a caption is counted as `no_caption`, a caption of a file that is not there as `missing_file`.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Rejected, Unit
from data_pipeline.inputs.media import CAPTION_FIELDS, EXTENSIONS, guess_domain, read_media, read_whole
from data_pipeline.inputs.names import as_stored, beside, files_below, shown_names
from data_pipeline.inputs.records.jsonl import parse_json

UNIT_BYTES = 4 << 20
METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_SUFFIXES = (".txt", ".json")
_TIMED = (".srt", ".vtt")  # captions that kind `clips` reads
_CONVERTED = ("heic", "heif", "svg", "psd", "pdf")  # pictures that another program can make a JPEG or PNG of
_RECORDS = ("jsonl", "parquet", "tar", "pptx", "html", "htm", "md")  # inputs of other kinds
_MEDIA = {extension for extensions in EXTENSIONS.values() for extension in extensions}


@dataclass(frozen=True)
class Folder:
    """domain: of what a record does not say itself; empty: image_text for pictures, video for clips (`ocr` suits pages
    with their text). A unit is a run of files in the order of their paths (extra: names and sizes); the last unit of a
    folder has its metadata files and the captions that stand alone, for files that are not there."""

    paths: tuple[str, ...]
    domain: str = ""
    allow_outside: bool = False

    def units(self) -> Sequence[Unit]:
        _metadata.cache_clear()  # the files may be others by now
        units = [unit for path in self.paths for unit in _units(path)]
        if not units:
            raise DataError(f"{', '.join(self.paths)}: no picture and no clip in it")
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        shown = shown_names(self.paths)[unit.path]
        alone = Path(unit.path).is_file()
        root = Path(unit.path).parent if alone else Path(unit.path)
        for name in unit.extra["files"]:
            origin = shown if alone else f"{shown}/{name}"
            try:
                yield self._draft(root, name, origin)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail)
        for name in unit.extra.get("alone", ()):
            yield Rejected(f"{shown}/{name}", "missing_file", "a caption, but no picture and no clip of this name")
        for name in unit.extra.get("metadata", ()):
            metadata = _metadata(unit.path, name, self.allow_outside)
            yield from (Rejected(f"{shown}/{name}", "bad_record", detail) for detail in metadata.damaged)
            for file in sorted(metadata.rows):
                if not os.path.isfile(as_stored(str(Path(unit.path, name).parent / file))):
                    yield Rejected(f"{shown}/{name}", "missing_file", f"{file}: named here, but not there")

    def _draft(self, root: Path, name: str, origin: str) -> Draft:
        extension = Path(name).suffix.lower().lstrip(".")
        field = next((field for field, extensions in EXTENSIONS.items() if extension in extensions), None)
        if field is None:
            raise BadSample(
                "unknown_extension", f"neither a picture nor a clip that can be read: .{extension}{_mend(extension)}"
            )
        record = self._caption(root, name)
        if "domain" not in record:
            domain = self.domain or guess_domain(int(field == "images"), int(field == "videos"))
            record = {"domain": domain, **record}
        media = read_media(name, root, field, allow_outside=self.allow_outside)
        return Draft(record, **{field: [media]}, origin=origin)

    def _caption(self, root: Path, name: str) -> dict[str, Any]:
        """What NAME.txt, NAME.json or the nearest metadata file above says of a file. Raises BadSample."""
        if (found := beside(root / name, _CAPTION_SUFFIXES)) is not None:
            file = found.relative_to(root).as_posix()
            data = read_whole(file, root, allow_outside=self.allow_outside)
            if found.suffix.lower() == ".txt":
                return _with_text({"text": _decoded(data, file)})
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
    captioned: set[str] = set()
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
        # A changed caption changes the checksum here, so that a build is not continued with it.
        checksums = [zlib.crc32(Path(root, name).read_bytes()) for name in metadata]
        extra = {"files": files, "sizes": sizes, "metadata": metadata, "alone": alone, "checksums": checksums}
        yield Unit(root, bytes=total, extra=extra)


def _walk(root: str) -> list[tuple[str, int]]:
    """(path below root, size) of every file that is not hidden, sorted by path. Links to folders are not followed."""
    return sorted((file.relative_to(root).as_posix(), file.lstat().st_size) for file in files_below(Path(root)))


def _with_text(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose text may stand under another name. Raises BadSample if there is none."""
    if "messages" in record:
        return record
    for field in CAPTION_FIELDS:
        if isinstance(record.get(field), str) and record[field].strip():
            return {"text": record[field], **{key: value for key, value in record.items() if key != field}}
    raise BadSample("no_caption", f"the caption is empty: one of {', '.join(CAPTION_FIELDS)} must hold it")


@dataclass(frozen=True)
class _Metadata:
    """rows: file name (_composed) -> what a metadata file says of it. damaged: what is wrong with its other lines."""

    rows: dict[str, dict[str, Any]]
    damaged: list[str]


@lru_cache(maxsize=8)
def _metadata(root: str, name: str, allow_outside: bool) -> _Metadata:
    try:
        content = _decoded(read_whole(name, Path(root), allow_outside=allow_outside), name)
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
            metadata.damaged.append(f'line {number} is no record with a "file_name"')
    return metadata


def _composed(name: str) -> str:
    """By which a name is found, however its accents are spelled: see names.as_stored."""
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


def _mend(extension: str) -> str:
    if extension in _CONVERTED:
        return " (convert it to JPEG or PNG)"
    return " (give the file itself as --input)" if extension in _RECORDS else ""


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"{name}: byte {error.start} is not UTF-8: convert the file with iconv") from error
