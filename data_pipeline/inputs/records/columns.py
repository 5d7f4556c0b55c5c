"""Which columns of a table hold its images, videos and texts.

A column is found by what it holds: Hugging Face's declaration, else its name and type, else the first of its values.
Where two readings are plausible, the message asks for the option that decides. Every column with bytes that is not used
has a name to be counted by: "column mask (struct with bytes)".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from data_pipeline.domains.rl_record import is_foreign_prompt
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.media import EXTENSIONS, as_media
from data_pipeline.inputs.records import chat_turns
from data_pipeline.inputs.records.media_values import bytes_and_path
from data_pipeline.inputs.records.prompt_formats import DOMAIN
from data_pipeline.inputs.records.questions import QUESTION_COLUMNS
from data_pipeline.inputs.records.record_fields import (
    LINK_NAMES,
    OPTIONS,
    TEXTS_ALONE,
    file_names,
    in_order,
    looks_like_file,
    media_names,
    path_names,
    text_names,
    url_names,
)

# Columns of a question and of its answer, which chat_formats.py and questions.py convert.
_PAIRS: tuple[frozenset[str], ...] = (QUESTION_COLUMNS, *map(frozenset, chat_turns.PAIRS))
_ALPACA = frozenset(chat_turns.PAIRS[0])  # a chat beside a column `text` too: that is its prompt as a whole
_DOCUMENT_NAMES = ("texts", "text_list")  # of interleaved documents and of sets of questions
_OWN_TEXT_NAMES = {"text", "caption", "txt"}  # names that say that a row is a text, beside a conversation too
_DECLARED = {"Image": "images", "Video": "videos", "Audio": "", "Pdf": ""}  # Hugging Face's types of columns

First = Callable[[str], Any]  # returns the first value of a column that is not empty, or None


@dataclass(frozen=True)
class Wanted:
    """What the user says about the columns."""

    text: str = ""
    image: tuple[str, ...] = ()
    video: tuple[str, ...] = ()
    domain: str = ""


@dataclass(frozen=True)
class Columns:
    """Columns of a table."""

    text: str  # column of the text; empty in a table of chats, questions or documents
    media: dict[str, list[str]]  # columns of "images" and of "videos"
    wanted: list[str]  # all columns to read
    not_read: dict[str, str]  # name of a column that is not read -> what it is called in the account
    domain: str  # of rows that name none; empty: from what they hold


def find_columns(path: str, schema: pa.Schema, given: Wanted, first: First) -> Columns:
    """Find the columns to read.

    Args:
        path: The table, for messages.
        schema: Its columns.
        given: What the user says about them.
        first: Returns the first value of a column that is not empty.

    Raises:
        DataError: A column that is needed or named does not exist, or it cannot be told which column is meant, or a
            column holds URLs.
    """
    existing = f"its columns are {', '.join(schema.names)}"
    given = replace(given, domain=DOMAIN) if not given.domain and is_foreign_prompt(schema.names) else given
    for name in (*filter(None, [given.text]), *given.image, *given.video):
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r}: {existing}")
    if doubled := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{path} has two columns {doubled[0]!r}: rename one")
    media = _media_columns(path, schema, given, first)
    used = [*media["images"], *media["videos"]]
    text = given.text or _text_column(path, schema, used, given.domain)
    if not text and not _is_complete_without_text(schema.names) and given.domain != DOMAIN:
        raise DataError(f"{path}: which column is the text? Name it with --set text=NAME; {existing}")
    _check_urls(path, schema, used, given.domain, first)
    if text and not used and not given.text and not given.domain and text.lower() not in TEXTS_ALONE:
        raise DataError(
            f"{path}: column {text!r} holds captions, but of what? --set image=NAME, or --set domain=text takes the "
            f"texts alone; {existing}"
        )
    wanted = [field.name for field in schema if field.name in used or _fits_json(field.type)]
    unread = [field for field in schema if field.name not in wanted]
    for field in unread:
        if field.name in (text, *chat_turns.LISTS, *_DOCUMENT_NAMES, "image_info"):
            raise DataError(f"{path}: column {field.name!r} has bytes in it ({field.type}), and is not read as a text")
    not_read = {field.name: f"column {field.name} ({_word(field.type)})" for field in unread}
    return Columns(text, media, wanted, not_read, given.domain)


def _media_columns(path: str, schema: pa.Schema, given: Wanted, first: First) -> dict[str, list[str]]:
    chosen = {"images": list(given.image), "videos": list(given.video)}
    taken = {*given.image, *given.video, given.text}
    if given.domain == "text":
        return chosen
    found: dict[str, list[str]] = {field: [] for field in EXTENSIONS}
    declared = _declared(schema)
    for column in schema:
        if column.name not in taken and not _fits_json(column.type):
            field = declared[column.name] if column.name in declared else _field_of(path, column, first)
            if field and not chosen[field]:
                found[field].append(column.name)
    if not any((*found.values(), *chosen.values())):
        found = _columns_of_paths(schema, first, taken)
    for field, names in found.items():
        ordered = in_order(names)
        if ordered is None:
            option = f"--set {OPTIONS[field]}="
            raise DataError(
                f"{path}: columns {' and '.join(names)} hold {field}: {option}{','.join(names)} takes these in order, "
                f"{option}{names[0]} only the first"
            )
        chosen[field] = chosen[field] or ordered
    _check_no_image_is_left(path, schema, chosen, taken, first)
    return chosen


def _field_of(path: str, column: pa.Field, first: First) -> str:
    """Return whether a column with bytes holds "images" or "videos"; empty: neither."""
    by_name = next((field for field in EXTENSIONS if media_names([column.name], field)), "")
    if not _is_media_type(column.type):
        return ""
    value = first(column.name)
    if value is None and by_name:
        return by_name
    if value is None and _names(_entry(column.type)) == {"bytes", "path"}:
        raise DataError(
            f"{path}: column {column.name!r} may hold images, but its first rows are empty: --set image={column.name}, "
            "or --set domain=text for texts alone"
        )
    data, name = bytes_and_path(value)
    if not data:
        return looks_like_file(name) or by_name
    try:
        return as_media(data, name)[0]
    except BadSample:
        return by_name


def _columns_of_paths(schema: pa.Schema, first: First, taken: set[str]) -> dict[str, list[str]]:
    """Return the columns with paths of files, or data: URIs."""
    names = [field.name for field in schema if field.name not in taken and _is_texts(field.type)]
    found = {field: media_names(names, field) or path_names(names, field) for field in EXTENSIONS}
    if not any(found.values()):
        fields = {name: looks_like_file(first(name)) for name in file_names(names)}
        found = {field: [name for name in fields if fields[name] == field] for field in EXTENSIONS}
    return found


def _check_no_image_is_left(
    path: str, schema: pa.Schema, chosen: dict[str, list[str]], taken: set[str], first: First
) -> None:
    """Check that a table without images has no column that is called like one or names files. Raises DataError."""
    if any(chosen.values()):
        return
    names = [field.name for field in schema if field.name not in taken and not pa.types.is_null(field.type)]
    for field in EXTENSIONS:
        if named := media_names(names, field):
            kind = schema.field(named[0]).type
            raise DataError(
                f"{path}: column {named[0]!r} is called like {field}, but its type is {kind}: "
                f"name the column with --set {OPTIONS[field]}=NAME, or take the texts alone with --set domain=text"
            )
    for column in schema:
        if column.name not in taken and _is_texts(column.type) and (field := looks_like_file(first(column.name))):
            raise DataError(
                f"{path}: column {column.name!r} names {field}: --set {OPTIONS[field]}={column.name}, or --set "
                "domain=text for texts alone"
            )


def _text_column(path: str, schema: pa.Schema, used: list[str], domain: str) -> str:
    """Return the column of the text; empty if there is none."""
    if domain == DOMAIN:
        return ""
    names = [field.name for field in schema if field.name not in used and _is_texts(field.type)]
    found = text_names(names)
    if _is_complete_without_text(schema.names):
        chats, texts = set(schema.names) & set(chat_turns.LISTS), set(found) & _OWN_TEXT_NAMES
        if chats and texts and domain != "chat":
            raise DataError(
                f"{path}: is a sample the conversation in {min(chats)!r} (--set domain=chat) or the text in "
                f"{min(texts)!r} (--set text={min(texts)})?"
            )
        return ""
    if "text" in found and "domain" in schema.names:  # a record of this project
        return "text"
    if len(found) > 1:
        raise DataError(f"{path}: columns {' and '.join(found)} may be the text: choose one, as --set text={found[0]}")
    return found[0] if found else ""


def _is_complete_without_text(names: Iterable[str]) -> bool:
    """Return whether the rows are chats, sets of questions or documents, which have no column of the text."""
    names = set(names)
    alone = names >= _ALPACA or (any(names >= pair for pair in _PAIRS) and "text" not in names)
    documents = not names.isdisjoint(_DOCUMENT_NAMES) and "text" not in names
    return alone or documents or not names.isdisjoint(chat_turns.LISTS)


def _check_urls(path: str, schema: pa.Schema, used: list[str], domain: str, first: First) -> None:
    """Check that no column of media holds URLs. Raises DataError."""
    if domain == "text":
        return
    suspects = [name for name in used if _is_texts(schema.field(name).type) and _is_url(first(name))]
    complete = _is_complete_without_text(schema.names)
    if not used and domain not in ("chat", DOMAIN):
        suspects += [name for name in url_names(schema.names) if not complete or name.lower() not in LINK_NAMES]
    suspects += [name for name in used if url_names([name])]
    if suspects:
        raise DataError(
            f"{path}: column {suspects[0]!r} holds URLs, and a build downloads nothing, so that it is reproducible: "
            "download them with img2dataset and give its tars, or take the texts alone with --set "
            f"domain={'chat' if complete else 'text'}"
        )


def _declared(schema: pa.Schema) -> dict[str, str]:
    """Return what Hugging Face's metadata of a table says: column -> "images", "videos" or "" (other files)."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        types = {name: _feature_type(feature) for name, feature in features.items()}
        return {name: _DECLARED[kind] for name, kind in types.items() if kind in _DECLARED}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _feature_type(feature: Any) -> str:
    while isinstance(feature, list) or (isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List")):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature.get("_type", "") if isinstance(feature, dict) else ""


def _entry(kind: pa.DataType) -> pa.DataType:
    """Return the type of the entries of a list, at any depth, and of the values of a dictionary."""
    while pa.types.is_dictionary(kind) or _is_list(kind):
        kind = kind.value_type
    return kind


def _is_media_type(kind: pa.DataType) -> bool:
    """Return whether values are bytes, or structs with one field of bytes; or lists of these."""
    entry = _entry(kind)
    if pa.types.is_struct(entry):
        return sum(_is_bytes(entry.field(index).type) for index in range(entry.num_fields)) == 1
    return _is_bytes(entry)


def _is_texts(kind: pa.DataType) -> bool:
    return pa.types.is_string(_entry(kind)) or pa.types.is_large_string(_entry(kind))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)


def _names(kind: pa.DataType) -> set[str]:
    """Return the names of the fields of a struct."""
    return {kind.field(index).name for index in range(kind.num_fields)}


def _fits_json(kind: pa.DataType) -> bool:
    """Return whether a type contains no bytes at any depth."""
    if pa.types.is_dictionary(kind):
        return _fits_json(kind.value_type)
    return not _is_bytes(kind) and all(_fits_json(kind.field(index).type) for index in range(kind.num_fields))


def _word(kind: pa.DataType) -> str:
    """Return what a type with bytes is called in accounts."""
    if _is_list(kind):
        return "list with bytes"
    return "binary" if _is_bytes(_entry(kind)) else "struct with bytes"


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and value[:8].lower().startswith(("http://", "https://"))
