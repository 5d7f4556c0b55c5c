"""Webdataset tars made elsewhere, read to be checked and written anew: KEY.json or KEY.txt with KEY.0.jpg, KEY.jpg ...

img2dataset's KEY.jpg + KEY.txt + KEY.json become image_text, the fields of the JSON kept. Members of one sample stand
together, as webdataset requires. What cannot be read of a damaged tar is counted as `damaged_file`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.jsonl import parse_json
from data_pipeline.inputs.media import CAPTION_FIELDS, EXTENSIONS, MAX_FILE_BYTES, guess_domain
from data_pipeline.inputs.names import shown_names

_Member = tuple[str, str, bytes | None]  # key, extension, bytes; None: too large to be held in memory


@dataclass(frozen=True)
class Tars:
    """domain: of samples that do not say it; empty: image_text or video for one picture or clip, text for none.
    text: the field of KEY.json that holds the text where there is no KEY.txt and no `text` or `caption`. A unit is a
    tar."""

    paths: tuple[str, ...]
    domain: str = ""
    text: str = ""

    def units(self) -> Sequence[Unit]:
        units = [Unit(path, bytes=os.path.getsize(path)) for path in self.paths]
        if not units:
            raise DataError("no tars are given")
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        shown = shown_names(self.paths)[unit.path]
        try:
            for key, members in groupby(_members(unit.path), key=lambda member: member[0]):
                origin = f"{shown}/{key}"
                try:
                    yield self._draft([(extension, data) for _, extension, data in members], origin)
                except BadSample as error:
                    yield Rejected(origin, error.reason, error.detail)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield Rejected(shown, "damaged_file", f"what follows cannot be read: {error}")

    def _draft(self, members: list[tuple[str, bytes | None]], origin: str) -> Draft:
        media: dict[str, list[tuple[int, Media]]] = {field: [] for field in EXTENSIONS}
        record: dict[str, Any] = {}
        caption: str | None = None
        for extension, data in members:
            number, _, last = extension.rpartition(".")
            field = next((field for field, known in EXTENSIONS.items() if last in known), None)
            if data is None:
                raise BadSample("file_too_large", f".{extension} has more than {MAX_FILE_BYTES:,} bytes")
            if extension == "json":
                record = _record(data)
            elif extension == "txt":
                caption = _caption(data)
            elif field and (not number or number.isdecimal()):
                media[field].append((int(number or 0), Media(last, data)))
        images, videos = ([file for _, file in sorted(media[field], key=lambda pair: pair[0])] for field in EXTENSIONS)
        if "messages" not in record and "domain" not in record:
            domain = self.domain or guess_domain(len(images), len(videos))
            record = {**record, "domain": domain, "text": self._text(record, caption)}
        return Draft(record, images, videos, origin)

    def _text(self, record: dict[str, Any], caption: str | None) -> str:
        if caption:
            return caption
        for field in (self.text, *CAPTION_FIELDS):
            if isinstance(record.get(field), str) and record[field].strip():
                return record[field]
        raise BadSample("no_caption", "no KEY.txt, and KEY.json has no text: name its field with --set text=FIELD")


def _members(path: str) -> Iterator[_Member]:
    """All plain files of a tar, compressed or not, in order. Nothing is unpacked: a name is only a key."""
    with tarfile.open(path, "r|*") as tar:
        for info in tar:
            name = PurePosixPath(info.name)
            stem, _, extension = name.name.partition(".")
            if info.isfile() and stem:  # an empty stem is a hidden file
                file = tar.extractfile(info) if info.size <= MAX_FILE_BYTES else None
                yield str(name.parent / stem), extension.lower(), file.read() if file else None


def _record(data: bytes) -> dict[str, Any]:
    record = parse_json(data)
    if not isinstance(record, dict):
        raise BadSample("bad_record", "KEY.json is not a JSON object")
    return record


def _caption(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("bad_record", f"KEY.txt is not UTF-8: {error}") from error
