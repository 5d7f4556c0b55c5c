"""Folders of images or videos with captions beside them; also a single image or video.

    cats/1.jpg  cats/1.txt            the caption, or a whole record in cats/1.json
    cats/metadata.jsonl               {"file_name": "1.jpg", "text": "A cat."}, as in Hugging Face's imagefolder
    cats/metadata.csv                 file_name,text

An image without a caption is rejected as `no_caption`, a caption without its file as `missing_file`. An image with
several captions becomes as many samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, NotRead, Rejected, Unit
from data_pipeline.inputs.media import (
    EXTENSIONS,
    as_media,
    has_media_name,
    is_media,
    read_head,
    read_whole,
)
from data_pipeline.inputs.names import SKIPPED_FOLDERS, as_stored, beside, shown_names
from data_pipeline.inputs.records.chat_formats import finished, is_foreign_chat, normalise_nameless
from data_pipeline.inputs.records.folder_captions import (
    CAPTION_SUFFIXES,
    METADATA,
    Line,
    captioned,
    decode_text,
    lost_captions,
    metadata_lines,
)
from data_pipeline.inputs.records.folder_files import CONVERTIBLE, OTHER_KINDS, folder_units, given_of
from data_pipeline.inputs.records.jsonl import parse_json
from data_pipeline.inputs.records.record_fields import NOT_CHOSEN, Captions, choose, complete, without_null_domain

_TIMED = (".srt", ".vtt")  # captions that the kind `clips` reads
_Entry = Draft | Rejected | NotRead


@dataclass(frozen=True)
class Folder:
    """Images and videos with captions. A unit is a range of files in the order of their paths.

    The last unit of a folder also has its metadata files, and the captions whose files do not exist.
    """

    paths: tuple[str, ...]  # folders, or single images and videos
    domain: str = ""  # of records that name none, e.g. ocr; empty: image_text for images, video for videos
    allow_outside: bool = False  # accept files outside the folder
    captions: Captions = "all"  # of a file with several: one sample each, or one of them
    text: str = ""  # field of NAME.json and metadata files with the caption; empty: text, caption, captions ...

    def units(self) -> Sequence[Unit]:
        """Return the units of all paths; `extra` says what their files are."""
        metadata_lines.cache_clear()  # the files may have changed
        units = [unit for path in self.paths for unit in folder_units(path, self.allow_outside)]
        if not units:
            raise DataError(f"{', '.join(self.paths)}: it holds no image and no video")
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the files, and the lines of metadata files."""
        return given_of(unit)

    def read(self, unit: Unit) -> Iterator[_Entry]:
        """Yield one sample per caption of each file."""
        shown = shown_names(self.paths)[unit.path]
        is_file = Path(unit.path).is_file()
        root = Path(unit.path).parent if is_file else Path(unit.path)
        files = (unit.extra.get(name, ()) for name in ("files", "captions", "lines"))
        for name, captions, lines in zip(*files, strict=True):
            origin = shown if is_file else f"{shown}/{name}"
            found = self._file(root, name, captions, lines, origin)
            yield from _accounted(found, origin, 1 + captions, max(len(lines) - 1, 0))
        for metadata, at, own_files in unit.extra.get("rows", ()):
            origin = f"{shown}/{metadata}"
            line = metadata_lines(str(root), metadata, self.allow_outside)[at]
            yield from _accounted(self._row(root, line, origin), origin, own_files, 1)
        yield from self._rest(root, unit.extra, shown)

    def _file(self, root: Path, name: str, captions: int, lines: Sequence[Any], origin: str) -> Iterator[_Entry]:
        """Yield the samples of one file, one per caption. Raises BadSample if none can be made."""
        suffix = Path(name).suffix.lower().lstrip(".")
        if not has_media_name(name) and not is_media(read_head(root / name)):
            raise BadSample("unknown_extension", f"not a supported image or video: .{suffix}{_fix(suffix)}")
        records, rejected, lost = self._records(root, name, lines)
        field, media = as_media(read_whole(name, root, allow_outside=self.allow_outside), name)
        yield from (Rejected(origin, "no_caption", detail) for detail in rejected)
        yield from (NotRead(what, count) for what, count in sorted(lost.items()))
        if others := captions - 1 if captions else 0:
            yield NotRead("caption file beside another one", others, {"files": others})  # NAME.json beside NAME.txt
        chosen = choose(records, self.captions, origin)
        if others := len(records) - len(chosen):
            yield NotRead(NOT_CHOSEN, others)
        yield from (self._draft(record, {field: [media]}, origin) for record in chosen)

    def _records(
        self, root: Path, name: str, lines: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[str], Counter[str]]:
        """Return the records of a file, one per caption, what is wrong with the others, and what is not read.

        They are in NAME.txt, NAME.json or the given lines of a metadata file: [metadata file, index, index ...].
        """
        if not lines:
            record = self._caption_file(root, name)
            return captioned(record, self.text), [], lost_captions(record, self.text)
        records: list[dict[str, Any]] = []
        lost = Counter[str]()
        rejected = []
        metadata = metadata_lines(str(root), lines[0], self.allow_outside)
        for at in lines[1:]:
            try:
                records += captioned(metadata[at].record, self.text)
                lost += lost_captions(metadata[at].record, self.text)
            except BadSample as error:
                rejected.append(error.detail)
        if not records:
            raise BadSample("no_caption", rejected[0])
        return records, rejected, lost

    def _caption_file(self, root: Path, name: str) -> dict[str, Any]:
        """Return the record of a file from NAME.txt or NAME.json."""
        if (found := beside(root / name, CAPTION_SUFFIXES)) is not None:
            file = found.relative_to(root).as_posix()
            data = read_whole(file, root, allow_outside=self.allow_outside)
            if found.suffix.lower() == ".txt":
                return {self.text or "text": decode_text(data, file)}
            content = parse_json(data)
            if not isinstance(content, dict):
                raise BadSample("bad_record", f"{file} is not a JSON object")
            return content
        timed = beside(root / name, _TIMED)
        hint = f"; {timed.relative_to(root).as_posix()} is read with --kind clips" if timed is not None else ""
        text, record = (PurePosixPath(name).with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
        raise BadSample("no_caption", f"no {text}, no {record} and no line in {' or '.join(METADATA)}{hint}")

    def _row(self, root: Path, line: Line, origin: str) -> Iterator[_Entry]:
        """Yield the samples of a metadata line with several files."""
        media: dict[str, list[Media]] = {field: [] for field in EXTENSIONS}
        for name in line.files:
            field, file = as_media(read_whole(name, root, allow_outside=self.allow_outside), name)
            media[field].append(file)
        records = captioned(line.record, self.text)
        yield from (NotRead(what, count) for what, count in sorted(lost_captions(line.record, self.text).items()))
        chosen = choose(records, self.captions, f"{origin}/{line.files[0]}")
        if others := len(records) - len(chosen):
            yield NotRead(NOT_CHOSEN, others)
        yield from (self._draft(record, media, origin) for record in chosen)

    def _draft(self, record: dict[str, Any], media: dict[str, list[Media]], origin: str) -> Draft:
        files = {field: media.get(field, []) for field in EXTENSIONS}
        record = without_null_domain(record)
        raw, notes = record, Counter[str]()
        if is_foreign_chat(record):
            record, files = normalise_nameless(record, files, notes)
        images, videos = files["images"], files["videos"]
        if "text" in record:
            record = complete(record, (len(images), len(videos)), self.domain)
        return finished(Draft(record, tuple(images), tuple(videos), origin), raw, notes)

    def _rest(self, root: Path, extra: Mapping[str, Any], shown: str) -> Iterator[_Entry]:
        """Yield what becomes of the files and lines of a folder that are in no sample."""
        for name in extra.get("alone", ()):
            detail = "a caption without an image or video of its name"
            yield Rejected(f"{shown}/{name}", "missing_file", detail, {"files": 1})
        for name, count in sorted(extra.get("others", {}).items()):
            yield NotRead(name, count, {} if name in SKIPPED_FOLDERS else {"files": count})
        for metadata, at in extra.get("left", ()):
            line = metadata_lines(str(root), metadata, self.allow_outside)[at]
            origin = f"{shown}/{metadata}"
            if line.problem:
                yield Rejected(origin, "bad_record", line.problem, {"lines": 1})
            elif not Path(as_stored(str(root / line.files[0]))).is_file():
                detail = f"{line.files[0]}: named here, but it does not exist"
                yield Rejected(origin, "missing_file", detail, {"lines": 1})
            else:
                yield NotRead("metadata line of a file with another caption", 1, {"lines": 1})


def _accounted(found: Iterator[_Entry], origin: str, files: int, lines: int) -> Iterator[_Entry]:
    """Yield what was read of some files and lines. The last sample or rejection accounts for all of them."""
    items = {"files": files, **({"lines": lines} if lines else {})}
    try:
        entries = list(found)
    except BadSample as error:
        yield Rejected(origin, error.reason, error.detail, items)
        return
    items["files"] -= sum(entry.items.get("files", 0) for entry in entries if isinstance(entry, NotRead))
    last = max(at for at, entry in enumerate(entries) if isinstance(entry, Draft))
    for at, entry in enumerate(entries):
        yield replace(entry, items={**entry.items, **items}) if at == last else entry


def _fix(extension: str) -> str:
    """Return what a user can do about a file that is not supported, in parentheses, or an empty string."""
    if extension in CONVERTIBLE:
        return " (convert it to JPEG or PNG)"
    return " (give the file itself with --input)" if extension in OTHER_KINDS else ""
