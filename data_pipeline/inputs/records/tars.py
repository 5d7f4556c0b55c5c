"""Webdataset tars from other tools, which are checked and rewritten: KEY.json or KEY.txt with KEY.0.jpg, KEY.jpg ...

Where names have more dots than that, shards.grouping says which members belong together.

img2dataset's KEY.jpg + KEY.txt + KEY.json become image_text samples that keep the fields of the JSON. Conversations in
other formats become chats, see chat_formats.py, and prompts samples of the domain rl, see prompt_formats.py. What
cannot be read of a damaged tar is rejected with its reason, and what follows it is read: see shards.scan.scan_shard.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, NotRead, Rejected, Unit
from data_pipeline.inputs.media import CAPTION_FIELDS, EXTENSIONS, as_media
from data_pipeline.inputs.names import shown_names
from data_pipeline.inputs.records.chat_formats import finished, is_foreign_chat, normalise_nameless
from data_pipeline.inputs.records.jsonl import parse_json
from data_pipeline.inputs.records.prompt_formats import (
    PromptOptions,
    as_prompt,
    finish_prompt,
    is_prompt,
    with_boxes,
)
from data_pipeline.inputs.records.record_fields import complete, without_null_domain
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.scan import count_members, scan_shard

OTHER_TEXT = "member .txt (KEY.json has the text)"  # name of a count
_NAMES = {"image": "image.jpg", "video": "video.mp4"}  # what a member is whose content is of no known type


@dataclass(frozen=True)
class Tars(PromptOptions):
    """Tars from other tools. A unit is one tar."""

    paths: tuple[str, ...]  # .tar files
    text: str = ""  # field of KEY.json with the text, for samples without KEY.txt; empty: `text` or `caption`

    def units(self) -> Sequence[Unit]:
        """Return one unit per tar."""
        return [Unit(path, bytes=os.path.getsize(path)) for path in self.paths]

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the members."""
        return {"members": count_members(Path(unit.path))}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield one sample per key, after the Rejected of what could not be read of the tar."""
        return self.read_first(unit, 0)

    def read_first(self, unit: Unit, count: int) -> Iterator[Draft | Rejected | NotRead]:
        """Read the first `count` members of a tar alone; 0: all of them."""
        shown = shown_names(self.paths)[unit.path]
        try:
            scan = scan_shard(Path(unit.path), count)
        except DataError as error:
            yield Rejected(shown, "not_a_tar", str(error), self.given(unit))
            return
        for key, bad in scan.rejected:
            members = {"members": scan.rejected_members.pop(key, 0)}
            yield Rejected(f"{shown}/{key}".rstrip("/"), bad.reason, bad.detail, members)
        for name, members_of_name in sorted(scan.not_read.items()):
            yield NotRead(name, members_of_name, {"members": members_of_name})
        reader = ShardReader()
        for sample in scan.samples:
            origin = f"{shown}/{sample.key}"
            members = {"members": len(sample.members)}
            if_text_only = _text_only(scan.skipped_media.get(sample.key, "")) if scan.has_media else ""
            try:
                draft = self._draft(sample, reader.read_members(unit.path, sample), origin, if_text_only)
                yield replace(draft, items={**draft.items, **members})
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail, members)
        reader.close()

    def _draft(self, sample: ShardSample, contents: list[bytes], origin: str, if_text_only: str) -> Draft:
        """Build the draft of a sample.

        Args:
            sample: The sample in the tar.
            contents: The content of each of its members.
            origin: Where it comes from.
            if_text_only: What is wrong with the sample if it has no image or video; empty: nothing.
        """
        media: dict[str, list[Media]] = {field: [] for field in EXTENSIONS}
        record: dict[str, Any] = {}
        caption = ""
        for member, data in zip(sample.members, contents, strict=True):
            if member.kind == "json":
                record = _record(data)
            elif member.kind == "txt":
                caption = _caption(data)
            else:
                field, file = as_media(data, _NAMES[member.kind])
                media[field].append(file)
        if is_prompt(record, self.default_domain):
            return self._prompt(record, media, caption, origin)
        given, notes = record, Counter[str]()
        if is_foreign_chat(record):
            record, media = normalise_nameless(record, media, notes)
        images, videos = media["images"], media["videos"]
        not_read: dict[str, int] = {}
        if "domain" not in record:
            if if_text_only and not self.domain and not images and not videos:
                raise BadSample("missing_member", if_text_only)
            text = self._text(record, caption)
            if isinstance(record.get("text"), str) and record["text"].strip() not in ("", text.strip()):
                not_read["field text"] = 1
            record = complete({**record, "text": text}, (len(images), len(videos)), self.domain)
        elif caption:  # KEY.json is a whole record
            not_read[OTHER_TEXT] = 1
        return finished(Draft(record, images, videos, origin, not_read=not_read), given, notes)

    def _prompt(self, record: dict[str, Any], media: dict[str, list[Media]], caption: str, origin: str) -> Draft:
        """Return the draft of a prompt in KEY.json, whose files are the other members."""
        record, read_as, notes = as_prompt(record, self)
        record, media = finish_prompt(record, media, notes)
        notes[OTHER_TEXT] += int(bool(caption))
        record = with_boxes(record, media["images"])
        return Draft(record, media["images"], media["videos"], origin, not_read=+notes, read_as=read_as)

    def _text(self, record: dict[str, Any], caption: str) -> str:
        candidates = [caption, *(record.get(field) for field in (self.text, *CAPTION_FIELDS))]
        for text in candidates:
            if isinstance(text, str) and text.strip():
                return text
        raise BadSample("no_caption", "no KEY.txt, and KEY.json has no text: name its field with --set text=FIELD")


def _text_only(skipped_member: str) -> str:
    """Return what is wrong with a text without media in a tar of media."""
    if skipped_member:
        return f"{skipped_member} is not read, and the text has no other file: use the names KEY.jpg, or KEY.0.jpg ..."
    return "a text without an image or video, unlike others of this tar: --set domain=text takes it as text"


def _record(data: bytes) -> dict[str, Any]:
    record = parse_json(data)
    if not isinstance(record, dict):
        raise BadSample("bad_record", "KEY.json is not a JSON object")
    return without_null_domain(record)


def _caption(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("bad_record", f"KEY.txt is not UTF-8: {error}") from error
