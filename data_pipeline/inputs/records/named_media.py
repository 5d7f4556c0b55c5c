"""Records of JSON with the files that they name, as drafts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Draft, Media
from data_pipeline.inputs.media import EXTENSIONS
from data_pipeline.inputs.records import (
    chat_formats,
    chat_parts,
    chat_turns,
    interleaved_formats,
    prompt_formats,
    questions,
)
from data_pipeline.inputs.records.media_values import media_of_value
from data_pipeline.inputs.records.record_fields import (
    LINK_NAMES,
    OPTIONS,
    TEXTS_ALONE,
    Captions,
    Texted,
    as_list,
    check_no_messages,
    file_names,
    in_order,
    looks_like_file,
    media_names,
    path_names,
    text_names,
    url_names,
    with_texts,
    without_null_domain,
)


@dataclass(frozen=True, kw_only=True)
class RecordOptions(prompt_formats.PromptOptions):
    """How the fields of records, or the columns of tables, are found."""

    text: str = ""  # field of the text; empty: found by name
    image: tuple[str, ...] = ()  # fields of images; empty: found by name, in tables by content too
    video: tuple[str, ...] = ()  # fields of videos; likewise
    captions: Captions = "all"  # which of a record's list of captions become samples, one each
    allow_outside: bool = False  # accept files outside the folder of the file that names them


@dataclass(frozen=True)
class RecordReader:
    """Builds drafts of records."""

    options: RecordOptions
    folder: Path  # the files that records name lie in it

    def drafts(self, record: dict[str, Any], origin: str) -> Iterator[Draft]:
        """Yield the drafts of a record: one, or one for each of its captions.

        Args:
            record: Its images and videos are paths relative to the folder, or data: URIs.
            origin: Where it comes from.

        Raises:
            BadSample: The record or one of its files cannot be used.
        """
        record = without_null_domain(record)
        domain = self._domain
        if prompt_formats.is_prompt(record, domain):
            yield self._prompt(record, origin)
            return
        if domain and "domain" not in record and not (domain == "chat" and chat_formats.is_foreign_chat(record)):
            record = {"domain": domain, **record}
        check_no_messages(record)
        record, read_as_before = self._with_media_of_chat(record)
        if questions.is_question_set(record):
            record = questions.as_conversation(record)
        given, notes = record, Counter[str]()
        record = converted(record, notes)
        record, read_as = self._with_media(record)
        read_as |= read_as_before
        media = {field: self._files(_paths(record, field), field) for field in EXTENSIONS}
        rest = {key: value for key, value in record.items() if key not in media}
        counts = len(media["images"]), len(media["videos"])
        for number, stored, omitted in self._with_texts(rest, counts, origin, read_as):
            where = f"{origin}#caption={number}" if number else origin
            draft = Draft(stored, media["images"], media["videos"], where, not_read=omitted, read_as=read_as)
            yield chat_formats.finished(draft, given, notes)

    def is_prompt(self, raw: Any) -> bool:
        """Return whether a record is a prompt.

        Args:
            raw: The record as it was given, parsed or as JSON; anything else is none.
        """
        try:
            record = json.loads(raw) if isinstance(raw, bytes) else raw
        except (ValueError, RecursionError):
            return False
        return isinstance(record, dict) and prompt_formats.is_prompt(record, self._domain)

    @cached_property
    def _domain(self) -> str:
        return self.options.default_domain

    def _prompt(self, record: dict[str, Any], origin: str) -> Draft:
        """Return the draft of a prompt."""
        record, read_as, notes = prompt_formats.as_prompt(record, self.options)
        record, renamed = self._with_media(record)
        prompt_formats.check_no_file_is_left(record)
        listed = {field: as_list(record.get(field)) for field in EXTENSIONS}
        if all(isinstance(value, str) for values in listed.values() for value in values):
            record, _ = prompt_formats.finish_prompt(record, None, notes)
            media = {field: self._files(record.pop(field, []), field) for field in EXTENSIONS}
        else:  # files in the record itself, which have no names
            media = {field: self._files(values, field) for field, values in listed.items()}
            rest = {key: value for key, value in record.items() if key not in EXTENSIONS}
            record, media = prompt_formats.finish_prompt(rest, media, notes)
        record = prompt_formats.with_boxes(record, media["images"])
        return Draft(record, media["images"], media["videos"], origin, not_read=notes, read_as=read_as | renamed)

    def _files(self, values: Sequence[Any], field: str) -> list[Media]:
        return [media_of_value(value, field, self.folder, allow_outside=self.options.allow_outside) for value in values]

    def _with_media_of_chat(self, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return a conversation with its files under names that its conversion knows, and what became of their names.

        Other records are returned unchanged.
        """
        is_named = any(name in record for name in (*self.options.image, *self.options.video))
        has_known = any(record.get(name) for name in (*EXTENSIONS, *OPTIONS.values()))
        if record.get("domain") == "text" or (has_known and not is_named):
            return record, {}
        is_chat = chat_formats.is_foreign_chat(record) or questions.is_question_set(record)
        return self._with_media(record) if is_chat and not _has_parts(record) else (record, {})

    def _with_media(self, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the record with its files under `images` and `videos`, and what became of their names."""
        if record.get("domain") in ("text", "chat") and not self.options.image and not self.options.video:
            return self._with_singular(record)
        read_as: dict[str, str] = {}
        given = {"images": self.options.image, "videos": self.options.video}
        for field, chosen in given.items():
            names = list(chosen) or self._names(record, field, given)
            if names == [field] or not names:
                continue
            if record.get("domain") == "chat" and field in record and record.keys().isdisjoint(names):
                continue  # its conversion has used them
            if missing := [name for name in names if name not in record]:
                raise BadSample("bad_record", f"it has no field {missing[0]!r}, which --set {OPTIONS[field]} names")
            files = [_path_of(path) for name in names for path in as_list(record[name])]
            record = {**{key: value for key, value in record.items() if key not in names}, field: files}
            read_as |= {f"field {name}": field for name in names}
        if not any(record.get(field) for field in EXTENSIONS):
            _check_no_file_is_left(record, self.options.domain)
        return record, read_as

    def _with_singular(self, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return a chat with `image` and `video` as lists. In texts they are fields like others."""
        if record.get("domain") == "text":
            return record, {}
        renamed = {
            singular: field
            for field, singular in OPTIONS.items()
            if field not in record and _is_file_list(as_list(record.get(singular)))
        }
        record = {renamed.get(key, key): as_list(value) if key in renamed else value for key, value in record.items()}
        return record, {f"field {name}": field for name, field in renamed.items()}

    def _names(self, record: dict[str, Any], field: str, given: dict[str, tuple[str, ...]]) -> list[str]:
        """Return the names of the fields with the images or videos of a record, in order."""
        if field in record:
            return [field]
        found = _holding(record, media_names(record, field)) or _holding(record, path_names(record, field))
        if not found and not any(given.values()) and (files := _holding(record, file_names(record))):
            used = [name for other in EXTENSIONS for name in media_names(record, other) + path_names(record, other)]
            kinds = {name: {looks_like_file(_path_of(path)) for path in as_list(record[name])} for name in files}
            found = [] if _holding(record, used) else [name for name in files if kinds[name] == {field}]
        ordered = in_order(found)
        if ordered is None:
            option = f"--set {OPTIONS[field]}="
            raise BadSample(
                "bad_record",
                f"{' and '.join(found)} may be its {field}: {option}{','.join(found)} or {option}{found[0]}",
            )
        return ordered

    def _with_texts(
        self, record: dict[str, Any], counts: tuple[int, int], origin: str, read_as: dict[str, str]
    ) -> Iterator[Texted]:
        if "messages" in record or record.get("domain") == "chat":
            yield 0, record, {}
            return
        name = self._text_name(record)
        if not name:
            if any(counts) and "domain" not in record:
                raise BadSample("no_caption", "which field is its text? --set text=FIELD")
            yield 0, record, {}
            return
        given = self.options.text or self.options.domain or "domain" in record
        if not any(counts) and not given and name.lower() not in TEXTS_ALONE:
            raise BadSample("missing_file", f"{name!r} without an image: --set image=FIELD, or --set domain=text")
        if name != "text":
            read_as[f"field {name}"] = "text"
        yield from with_texts(record, name, counts, self.options.captions, origin)

    def _text_name(self, record: dict[str, Any]) -> str:
        """Return the name of the field with the text of a record; empty if there is none."""
        if self.options.text:
            if not _is_text(record.get(self.options.text)):
                raise BadSample("no_caption", f"its field {self.options.text!r} holds no text")
            return self.options.text
        names = [name for name in text_names(record) if record[name] and _is_text(record[name])]
        if isinstance(record.get("text"), str) and ("domain" in record or names in ([], ["text"])):
            return "text"
        if len(names) > 1:
            raise BadSample("bad_record", f"{' and '.join(names)} may be its text: --set text={names[0]}")
        return names[0] if names else ""


def converted(record: dict[str, Any], notes: Counter[str] | None = None) -> dict[str, Any]:
    """Convert a record in the format of another tool; return any other record unchanged.

    Args:
        record: The record.
        notes: Gets what of a conversation is not read, by name.

    Raises:
        BadSample: It cannot be converted.
    """
    if questions.is_question_set(record):
        record = questions.as_conversation(record)
    if chat_formats.is_foreign_chat(record):
        return chat_formats.normalise(record, notes)
    if interleaved_formats.is_foreign_interleaved(record):
        return interleaved_formats.normalise(record)
    return record


def paths_named(record: Any) -> list[str]:
    """Return the paths that a record names, to estimate its size; [] if it cannot be used."""
    try:
        record = record if prompt_formats.is_prompt(record) else converted(record)
        return [path for field in EXTENSIONS for path in _files_of(record, field) if isinstance(path, str)]
    except (ValueError, RecursionError, AttributeError, TypeError):  # reading will reject it
        return []


def _files_of(record: dict[str, Any], field: str) -> Sequence[Any]:
    if record.get(field):
        return record[field]
    names = [*media_names(record, field), *path_names(record, field)]
    return [path for name in names for path in as_list(record[name])]


def _paths(record: dict[str, Any], field: str) -> list[str]:
    paths = [_path_of(path) for path in as_list(record.get(field) or None)]
    if not all(isinstance(path, str) for path in paths):
        raise BadSample("bad_record", f'"{field}" must be a list of paths')
    return paths


def _check_no_file_is_left(record: dict[str, Any], domain: str) -> None:
    """Check that a record without files names none under an unknown field, which would make it a text alone."""
    if "domain" in record or domain:
        return
    is_chat = chat_formats.is_foreign_chat(record) or questions.is_question_set(record)
    alone = f"--set domain={'chat' if is_chat else 'text'} for texts alone"
    for name, value in record.items():
        values = as_list(value)
        if name not in ("text", "texts") and values and all(map(looks_like_file, map(_path_of, values))):
            field = looks_like_file(_path_of(values[0]))
            raise BadSample(
                "bad_record",
                f"{name!r} names {field}: --set {OPTIONS[field]}={name}, or {alone}",
            )
    urls = [name for name in url_names(record) if record[name] and not (is_chat and name.lower() in LINK_NAMES)]
    if urls:
        raise BadSample("remote_file", f"{urls[0]!r} is a URL: download the files with img2dataset, or {alone}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str | dict))


def _holding(record: dict[str, Any], names: list[str]) -> list[str]:
    """Return the names whose values are paths, or lists of paths."""
    return [name for name in names if record[name] and _is_file_list(as_list(record[name]))]


def _is_file_list(values: list[Any]) -> bool:
    paths = list(map(_path_of, values))
    return bool(paths) and all(isinstance(path, str) and path for path in paths)


def _path_of(value: Any) -> Any:
    """Return the path in an object of a path and no bytes, as Hugging Face writes it; any other value unchanged."""
    return value["path"] if isinstance(value, dict) and value.get("path") and not value.get("bytes") else value


def _has_parts(record: dict[str, Any]) -> bool:
    """Return whether the messages of a conversation name files themselves."""
    record = chat_turns.parsed(record)
    turns = as_list(record.get(chat_turns.list_name(record) or ""))
    contents = (turn.get(chat_parts.content_key(turn)) for turn in turns if isinstance(turn, dict))
    return any(isinstance(content, list) for content in contents)
