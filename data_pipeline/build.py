"""Making shards from records, and indexes for shards that someone else made.

What cannot be trained on is never written or indexed: it is counted by reason and listed in rejected.jsonl.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat import DEFAULT_FORM
from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.errors import BadSample, DataError
from data_pipeline.images import decode_image, grid_of, probe_image, resized_size
from data_pipeline.index import ShardIndex, index_row, write_catalogue, write_index
from data_pipeline.sample import Image, Video
from data_pipeline.shards import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    RawSample,
    ShardReader,
    ShardSample,
    ShardWriter,
    scan_shard,
)
from data_pipeline.tokens import GlmTokenizer, tokenize
from data_pipeline.video import VideoInfo, plan_video, probe_video, video_slices

REJECTED = "rejected.jsonl"
MAX_SHARD_BYTES = 1 << 30
Tick = Callable[[], None]


@dataclass
class Report:
    """What became of the samples. rejected: reason, shard, key, detail of each one set aside."""

    samples: Counter[str] = field(default_factory=Counter)  # by domain
    rejected: list[dict[str, Any]] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)

    def reject(self, shard: str, key: str, error: BadSample, **where: int) -> None:
        self.rejected.append({"reason": error.reason, "shard": shard, "key": key, **where, "detail": error.detail})

    def reasons(self) -> Counter[str]:
        return Counter(entry["reason"] for entry in self.rejected)


def build_shards(
    records: Path,
    out: Path,
    *,
    tokenizer: GlmTokenizer | None,
    name: str = "shard",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    chat_form: str = DEFAULT_FORM,
    tick: Tick = lambda: None,
) -> Report:
    """Writes shards and indexes from a JSON-lines file whose records name their files ("images", "videos", relative to
    it). Every picture is decoded whole and every clip's last frame is reached, so that damaged ones do not get in.

    A sample's key is the number of its line. Raises DataError if `records` cannot be read or shards called so exist.
    """
    out.mkdir(parents=True, exist_ok=True)
    if max_shard_bytes < 1:
        raise DataError(f"--max-shard-bytes {max_shard_bytes}: give a positive number")
    if existing := sorted(out.glob(f"{name}-[0-9]*.tar")):
        raise DataError(f"{existing[0]} exists: choose another --name or --out, or remove it")
    report = Report()
    rows: dict[Path, list[dict[str, Any]]] = {}
    with ShardWriter(out, name, max_shard_bytes) as writer:
        for number, line in _lines(records):
            key = f"{number:09d}"
            try:
                raw, extensions = _load(line, records.parent)
                measured = measure(raw, tokenizer, chat_form, whole=True)
            except BadSample as error:
                report.reject(records.name, key, error, line=number + 1)
            else:
                record = json.dumps(raw.record, ensure_ascii=False).encode()
                files = [("json", record), *zip(extensions, [*raw.images, *raw.videos], strict=True)]
                row = _row(writer.write(key, files), measured)
                rows.setdefault(writer.path, []).append(row)
                report.samples[measured.domain] += 1
            tick()
    for shard in writer.finished:
        write_index(shard, rows[shard], tokenizer_hash=tokenizer.hash if tokenizer else "", chat_form=chat_form)
        report.shards.append(shard)
    _write_rejected(
        out / REJECTED, report.rejected, replaces={records.name, *(shard.name for shard in writer.finished)}
    )
    write_catalogue(out)
    return report


def index_shards(
    shards: list[Path],
    *,
    tokenizer: GlmTokenizer | None,
    chat_form: str = DEFAULT_FORM,
    tick: Tick = lambda: None,
) -> Report:
    """Writes the index of every given shard, reading headers of images and clips only. Raises DataError."""
    report = Report()
    for shard in shards:
        index_shard(shard, tokenizer=tokenizer, chat_form=chat_form, report=report)
        tick()
    for folder in sorted({shard.parent for shard in shards}):
        names = {shard.name for shard in shards if shard.parent == folder}
        entries = [entry for entry in report.rejected if entry["shard"] in names]
        _write_rejected(folder / REJECTED, entries, replaces=names)
        write_catalogue(folder)
    return report


def index_shard(shard: Path, *, tokenizer: GlmTokenizer | None, chat_form: str, report: Report) -> None:
    """Writes one shard's index and adds what it met to the report."""
    rows = []
    reader = ShardReader()
    scan = scan_shard(shard)
    for key, error in scan.rejected:
        report.reject(shard.name, key, error)
    for sample in scan.samples:
        try:
            raw = reader.read(str(shard), sample)
            measured = measure(raw, tokenizer, chat_form)
        except BadSample as error:
            report.reject(shard.name, sample.key, error)
        else:
            rows.append(_row(sample, measured))
            report.samples[measured.domain] += 1
    reader.close()
    write_index(shard, rows, tokenizer_hash=tokenizer.hash if tokenizer else "", chat_form=chat_form)
    report.shards.append(shard)


@dataclass(frozen=True)
class Measured:
    """What the index keeps of a sample. text_tokens: all tokens but <|image|>; 0 without a tokenizer.
    blocks: what index.index_row asks for; none without a tokenizer."""

    domain: str
    text_tokens: int
    images: list[tuple[int, int]]
    videos: list[VideoInfo]
    blocks: list[tuple[bool, int, int]]


def _row(sample: ShardSample, measured: Measured) -> dict[str, Any]:
    return index_row(sample, measured.domain, measured.text_tokens, measured.images, measured.videos, measured.blocks)


def measure(raw: RawSample, tokenizer: GlmTokenizer | None, chat_form: str, *, whole: bool = False) -> Measured:
    """Checks that a sample can be trained on and measures it. whole: decode every image and clip. Raises BadSample."""
    budget = PixelBudget()
    sample = build_sample(raw.record, images=len(raw.images), videos=len(raw.videos), chat_form=chat_form)
    images = [probe_image(data) for data in raw.images]
    videos = [probe_video(data) for data in raw.videos]
    grids = [grid_of(resized_size(*size, max_tokens=budget.image_max_tokens)) for size in images]
    layouts = [plan_video(info, budget.video_max_tokens) for info in videos]
    if whole:
        for data in raw.images:
            decode_image(data)
        for data in raw.videos:
            video_slices(data, budget.video_max_tokens)
    if tokenizer is None:
        return Measured(sample.domain, 0, images, videos, [])
    tokenized = tokenize(sample, tokenizer, grids, layouts)
    text_before = np.concatenate([[0], np.cumsum(tokenized.input_ids != tokenizer.image_id)]).tolist()
    is_video = [isinstance(segment, Video) for segment in sample.segments if isinstance(segment, Image | Video)]
    blocks = [
        (video, text_before[start], text_before[start + length] - text_before[start])
        for video, (start, length) in zip(is_video, tokenized.blocks, strict=True)
    ]
    return Measured(sample.domain, text_before[-1], images, videos, blocks)


def verify_shard(shard: ShardIndex, tokenizer: GlmTokenizer | None = None, tick: Tick = lambda: None) -> Report:
    """Reads every indexed sample back: checksums, records, and every image and clip decoded (encoded, with a
    tokenizer)."""
    report = Report(shards=[shard.file])
    reader = ShardReader()
    for row in range(shard.table.num_rows):
        sample = shard.sample(row)
        try:
            raw = reader.read(str(shard.file), sample, shard.header.tar_fingerprint)
            if tokenizer is not None:
                encode_record(
                    *(raw.record, raw.images, raw.videos),
                    tokenizer=tokenizer,
                    budget=PixelBudget(),
                    chat_form=shard.header.chat_form,
                )
            else:
                measure(raw, None, shard.header.chat_form, whole=True)
            report.samples[str(raw.record["domain"])] += 1
        except BadSample as error:
            report.reject(shard.file.name, sample.key, error)
        tick()
    reader.close()
    return report


def _lines(records: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(records, encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{records} cannot be read ({error}): give a UTF-8 file with one JSON object a line") from error


def _load(line: str, folder: Path) -> tuple[RawSample, list[str]]:
    """A line of the input -> the sample's record and bytes, and the extensions of its members ("0.jpg" ...)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadSample("bad_record", "not a JSON object")
    contents: dict[str, list[bytes]] = {"images": [], "videos": []}
    extensions: list[str] = []
    for field_name, known in (("images", IMAGE_EXTENSIONS), ("videos", VIDEO_EXTENSIONS)):
        paths = record.pop(field_name, None) or []
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise BadSample("bad_record", f'"{field_name}" must be a list of paths')
        for number, path in enumerate(paths):
            extension = Path(path).suffix.lower().lstrip(".")
            if extension not in known:
                raise BadSample("unknown_extension", f"{path}: {field_name} end in one of {', '.join(known)}")
            try:
                contents[field_name].append((folder / path).read_bytes())
            except OSError as error:
                raise BadSample("missing_file", f"{path}: {error.strerror}") from error
            extensions.append(f"{number}.{extension}")
    return RawSample(record, contents["images"], contents["videos"]), extensions


def _write_rejected(path: Path, entries: list[dict[str, Any]], replaces: set[str]) -> None:
    """Replaces the lines about these files, keeps those about others."""
    kept = []
    if path.is_file():
        kept = [entry for entry in map(json.loads, path.read_text().splitlines()) if entry["shard"] not in replaces]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in [*kept, *entries]))
    os.replace(temporary, path)
