"""One task of a build: its units are read, checked, measured and written to shards of its own.

    out/.build/task-00007-1f03.../     what is being written; removed when the task is begun anew
    out/shard-00007-00000.tar             renamed from there when the whole task is written, and its index with it
    out/.build/task-00007.reading      where it is, for whoever finds its process dead (crashes.py)
    out/.build/task-00007.json         the done record, renamed last: without it the task is not done

So whoever is killed, at whatever moment, leaves a task done or not done, and doing it again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from common.files import write_text
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Input, Rejected
from data_pipeline.inputs.names import printable
from data_pipeline.sharding.crashes import READING, Crash, Deaths, Place, ReadingNote, take_place
from data_pipeline.sharding.measure import KNOWN_FIELDS, Measured, measure
from data_pipeline.sharding.tasks import BuildOptions, Task
from data_pipeline.shards.index import index_path, write_index
from data_pipeline.shards.members import MAX_BYTES
from data_pipeline.shards.reader import RawSample
from data_pipeline.shards.writer import ShardWriter

WORK = ".build"


@dataclass(frozen=True)
class TaskJob:
    """A task with all that it takes to do it in any process. inputs: those that its units are of, by number.
    crashes: what its workers died of, and is left out."""

    task: Task
    inputs: dict[int, Input]
    options: BuildOptions
    crashes: tuple[Crash, ...] = ()


@dataclass
class Counts:
    """What became of the samples. shards: {"file", "samples", "bytes", "sha256"} of each."""

    samples: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    unused_fields: Counter[str] = field(default_factory=Counter)  # of records: kept, but nothing reads them
    shards: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.samples += other.samples
        self.domains += other.domains
        self.rejected += other.rejected
        self.unused_fields += other.unused_fields
        self.shards += other.shards

    def as_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "bytes": sum(shard["bytes"] for shard in self.shards),
            "domains": dict(sorted(self.domains.items())),
            "rejected": dict(sorted(self.rejected.items())),
            "unused_fields": dict(sorted(self.unused_fields.items())),
            "shards": self.shards,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counts:
        counters = {key: Counter(content[key]) for key in ("domains", "rejected", "unused_fields")}
        return cls(samples=content["samples"], shards=content["shards"], **counters)


def done_record(out: Path, task: int) -> Path:
    return out / WORK / f"task-{task:05d}.json"


def rejected_part(out: Path, task: int) -> Path:
    return out / WORK / f"task-{task:05d}.rejected.jsonl"


def reading_note(out: Path, task: int) -> Path:
    return out / WORK / f"task-{task:05d}.reading"


def try_again(job: TaskJob, how: str, deaths: Deaths) -> TaskJob | None:
    """The task as it is to be done after its worker died, for an executor; None: not again."""
    place = take_place(reading_note(Path(job.options.out), job.task.number))
    crash = deaths.blame(job.task, place, how)
    if job.task.number in deaths.given_up:
        return None
    return replace(job, crashes=(*job.crashes, crash)) if crash else job


def write_task(job: TaskJob) -> Counts:
    """Does one task. Raises DataError or OSError where no sample is to blame."""
    out, number = Path(job.options.out), job.task.number
    for left_over in (out / WORK).glob(f"task-{number:05d}-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    folder = out / WORK / f"task-{number:05d}-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    counts = Counts()
    shards = _Shards(folder, job.options, number)
    note = ReadingNote(reading_note(out, number))
    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejections:
        for draft in _drafts(job, note):
            try:
                if isinstance(draft, Rejected):
                    raise BadSample(draft.reason, draft.detail)
                record, measured = _checked(draft, job.options)
                stored = _stored(record)
            except BadSample as error:
                counts.rejected[error.reason] += 1
                write_rejected(rejections, error.reason, draft.origin, error.detail)
            else:
                counts.samples += 1
                counts.domains[measured.domain] += 1
                counts.unused_fields.update(record.keys() - KNOWN_FIELDS)
                shards.add(stored, draft, measured)
    note.remove()
    counts.shards = shards.close()
    for shard in counts.shards:
        os.replace(folder / shard["file"], out / shard["file"])
        os.replace(index_path(folder / shard["file"]), index_path(out / shard["file"]))
    os.replace(folder / "rejected.jsonl", rejected_part(out, number))
    write_json(done_record(out, number), counts.as_json())
    shutil.rmtree(folder, ignore_errors=True)
    return counts


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_rejected(file: TextIO, reason: str, origin: str, detail: str) -> None:
    line = {"reason": reason, "origin": printable(origin), "detail": printable(detail)}
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@lru_cache(maxsize=2)
def load_tokenizer(folder: str) -> GlmTokenizer | None:
    return GlmTokenizer(folder) if folder else None


def _drafts(job: TaskJob, note: ReadingNote) -> Iterator[Draft | Rejected]:
    crashes = {crash.place: crash.how for crash in job.crashes}
    for number, (given, unit) in enumerate(job.task.pieces):
        here = Place(number, READING)
        if here in crashes:
            span = f"{unit.start} to {unit.stop} of it are" if unit.stop else "it is"
            yield Rejected(unit.path, "crashed_reader", f"its reader died twice ({crashes[here]}); {span} left out")
            continue
        note.at(here)
        try:
            for count, draft in enumerate(job.inputs[given].read(unit)):
                place = Place(number, count)
                if place in crashes:
                    detail = f"what decodes it died twice ({crashes[place]}); it is left out"
                    yield Rejected(draft.origin, "crashed_reader", detail)
                else:
                    note.at(place)
                    yield draft
                    note.at(here)
        except (DataError, OSError, MemoryError):
            raise
        except Exception as error:  # a library's bug on one file must not end a build of days
            yield Rejected(
                unit.path, "unreadable_input", f"{type(error).__name__}: {error}; the rest of it is left out"
            )


def _checked(draft: Draft, options: BuildOptions) -> tuple[dict[str, Any], Measured]:
    """The record as it is stored, and the measured sample. Raises BadSample."""
    record = dict(draft.record)
    if "source" in record:
        record["given_source"] = record.pop("source")
    record["source"] = printable(draft.origin)
    for kind, files in (("image", draft.images), ("video", draft.videos)):
        for file in files:
            check_size(kind, len(file.data))
    raw = RawSample(record, [file.data for file in draft.images], [file.data for file in draft.videos])
    return record, measure(raw, load_tokenizer(options.tokenizer), options.chat_form, whole=True)


def _stored(record: dict[str, Any]) -> bytes:
    """KEY.json. JSON has no NaN and no infinity: a field that is one becomes null. Raises BadSample."""
    try:
        written = json.dumps(record, ensure_ascii=False)
        if any(word in written for word in ("NaN", "Infinity")):
            written = json.dumps(json.loads(written, parse_constant=lambda _: None), ensure_ascii=False)
        data = written.encode()
    except (UnicodeEncodeError, RecursionError) as error:  # half of a surrogate pair, as "\ud83d" in JSON
        raise BadSample("bad_record", f"the record cannot be written: {error}") from error
    check_size("json", len(data))
    return data


def check_size(kind: str, size: int) -> None:
    if size > MAX_BYTES[kind]:
        raise BadSample(
            "member_too_large", f"a member of kind {kind} has {size:,} bytes, {MAX_BYTES[kind]:,} are allowed"
        )


class _Shards:
    """The shards of a task, one after the other in a folder, each with its index."""

    def __init__(self, folder: Path, options: BuildOptions, task: int):
        self.options, self.task = options, task
        self.samples = 0
        self._writer = ShardWriter(folder, f"{options.name}-{task:05d}", options.shard_bytes)
        self._rows: list[dict[str, Any]] = []
        self._finished: list[dict[str, Any]] = []

    def add(self, record: bytes, draft: Draft, measured: Measured) -> None:
        files = [("json", record)]
        for media in (draft.images, draft.videos):
            files += [(f"{number}.{file.extension}", file.data) for number, file in enumerate(media)]
        sample = self._writer.write(f"{self.task:05d}-{self.samples:06d}", files)
        self._index_finished()
        self._rows.append(measured.index_row(sample))
        self.samples += 1

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard; what the manifest says of all of them."""
        self._writer.close()
        self._index_finished()
        return self._finished

    def _index_finished(self) -> None:
        """The index of the shard that the writer has just finished, if it has."""
        if len(self._writer.finished) == len(self._finished):
            return
        path = self._writer.finished[-1]
        tokenizer = load_tokenizer(self.options.tokenizer)
        write_index(
            path, self._rows, tokenizer_hash=tokenizer.hash if tokenizer else "", chat_form=self.options.chat_form
        )
        self._finished.append(
            {
                "file": path.name,
                "samples": len(self._rows),
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        )
        self._rows = []
