"""Webdataset tars made elsewhere, read to be checked and written anew: KEY.json or KEY.txt with KEY.0.jpg, KEY.jpg ...

img2dataset's KEY.jpg + KEY.txt + KEY.json become image_text, the fields of the JSON kept; conversations in the forms of
others become chats, see chat.py. What cannot be read of a damaged tar is counted with its reason, and what follows it
is read: see shards.scan_shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.media import CAPTION_FIELDS, EXTENSIONS, as_media, guess_domain
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.records.chat_formats import is_foreign_chat, normalise_nameless
from data_pipeline.inputs.records.jsonl import parse_json
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.scan import scan_shard


@dataclass(frozen=True)
class Tars:
    """domain: of samples that do not say it; empty: image_text or video for one picture or clip, interleaved for
    several, text in tars without any. text: the field of KEY.json that holds the text where there is no KEY.txt and no
    `text` or `caption`. A unit is a tar."""

    paths: tuple[str, ...]
    domain: str = ""
    text: str = ""

    def units(self) -> Sequence[Unit]:
        return [Unit(path, bytes=os.path.getsize(path)) for path in self.paths]

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        shown = shown_names(self.paths)[unit.path]
        try:
            scan = scan_shard(Path(unit.path))
        except DataError as error:
            yield Rejected(shown, "not_a_tar", str(error))
            return
        for key, bad in scan.rejected:
            yield Rejected(f"{shown}/{key}".rstrip("/"), bad.reason, bad.detail)
        of_media = bool(scan.skipped_media) or any(
            member.kind in ("image", "video") for sample in scan.samples for member in sample.members
        )
        reader = ShardReader()
        for sample in scan.samples:
            origin = f"{shown}/{sample.key}"
            alone = _alone(scan.skipped_media.get(sample.key, "")) if of_media else ""
            try:
                yield self._draft(sample, reader.read_members(unit.path, sample), origin, alone)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail)
        reader.close()

    def _draft(self, sample: ShardSample, contents: list[bytes], origin: str, alone: str) -> Draft:
        """alone: what is wrong with a sample without a picture or clip; empty if nothing is."""
        media: dict[str, list[Media]] = {field: [] for field in EXTENSIONS}
        record: dict[str, Any] = {}
        caption = ""
        for member, data in zip(sample.members, contents, strict=True):
            if member.kind == "json":
                record = _record(data)
            elif member.kind == "txt":
                caption = _caption(data)
            else:
                field, file = as_media(data)
                media[field].append(file)
        if is_foreign_chat(record):
            record, media = normalise_nameless(record, media)
        images, videos = media["images"], media["videos"]
        if "domain" not in record:
            if alone and not self.domain and not images and not videos:
                raise BadSample("missing_member", alone)
            domain = self.domain or guess_domain(len(images), len(videos))
            record = {**record, "domain": domain, "text": self._text(record, caption)}
        return Draft(record, images, videos, origin)

    def _text(self, record: dict[str, Any], caption: str) -> str:
        candidates = [caption, *(record.get(field) for field in (self.text, *CAPTION_FIELDS))]
        for text in candidates:
            if isinstance(text, str) and text.strip():
                return text
        raise BadSample("no_caption", "no KEY.txt, and KEY.json has no text: name its field with --set text=FIELD")


def _alone(passed_over: str) -> str:
    if passed_over:
        return f"{passed_over} is not read, and nothing else goes with the text: name it KEY.jpg, several KEY.0.jpg ..."
    return "a text without a picture or clip, which others of this tar have: --set domain=text takes it as text"


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
