"""Write one task of a build: read its units, check and measure the samples, write shards of its own.

    out/.build/task-00007-1f03.../     what is being written; removed when the task starts again
    out/shard-00007-00000.tar          renamed from there, with its index, when the whole task is written
    out/.build/task-00007.reading      where the task is, for the process that finds its worker dead (crashes.py)
    out/.build/task-00007.json         the done record, renamed last: without it the task is not done

A process that is killed at any moment leaves its task done or not done. Doing the task again gives the same bytes.
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

from common.files import replacing, sync_folder, write_json
from data_pipeline.domains.chat import DEFAULT_FORM
from data_pipeline.encoding.generations import choose_chat_form
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError, UnusedSample
from data_pipeline.inputs.draft import Draft, Input, NotRead, Rejected
from data_pipeline.inputs.names import printable
from data_pipeline.sharding.accounting import Accounts
from data_pipeline.sharding.crashes import READING, Crash, Deaths, ReadingNote, ReadingPosition, take_position
from data_pipeline.sharding.fields import unused_fields, unused_message_keys
from data_pipeline.sharding.measure import Measured, measure
from data_pipeline.sharding.tasks import BuildOptions, Task
from data_pipeline.shards.index import index_path, write_index
from data_pipeline.shards.members import MAX_BYTES
from data_pipeline.shards.prompt_facts import FactsRow, facts_path, write_facts
from data_pipeline.shards.reader import RawSample
from data_pipeline.shards.writer import ShardWriter

WORK = ".build"


@dataclass(frozen=True)
class TaskJob:
    """A task with all that any process needs to do it."""

    task: Task
    inputs: dict[int, Input]  # the inputs of its units, by number
    options: BuildOptions
    crashes: tuple[Crash, ...] = ()  # positions at which its workers died; they are rejected


@dataclass
class Counts:
    """What became of an input."""

    samples: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    unused_fields: Counter[str] = field(default_factory=Counter)  # fields of records that nothing reads; they are kept
    not_read: Counter[str] = field(default_factory=Counter)  # what of the input is in no sample, by name
    accounts: Accounts = field(default_factory=Accounts)  # of the items of the input
    shards: list[dict[str, Any]] = field(default_factory=list)  # {"file", "samples", "bytes", "sha256"} of each

    def add(self, other: Counts) -> None:
        """Add the counts of another task."""
        self.samples += other.samples
        self.domains += other.domains
        self.rejected += other.rejected
        self.unused_fields += other.unused_fields
        self.not_read += other.not_read
        self.accounts.add(other.accounts)
        self.shards += other.shards

    def take(self, draft: Draft, record: dict[str, Any], domain: str) -> None:
        """Count a draft that became a sample, with the fields of its record."""
        self.samples += 1
        self.domains[domain] += 1
        self.unused_fields.update(unused_fields(record))
        self.not_read.update(draft.not_read)
        self.not_read.update(unused_message_keys(record))
        self.accounts.give(draft.given)
        self.accounts.use(draft.items, "in_samples")

    def reject(self, found: Draft | Rejected, reason: str) -> None:
        """Count a draft that cannot become a sample."""
        self.rejected[reason] += 1
        self.accounts.give(found.given)
        self.accounts.use(found.items, "rejected")

    def skip(self, found: NotRead) -> None:
        """Count what a kind does not read."""
        self.not_read[found.name] += found.count
        self.accounts.use(found.items, "not_read")

    def as_json(self) -> dict[str, Any]:
        """Return the counts as the manifest holds them."""
        return {
            "samples": self.samples,
            "bytes": sum(shard["bytes"] for shard in self.shards),
            "domains": dict(sorted(self.domains.items())),
            "rejected": dict(sorted(self.rejected.items())),
            "unused_fields": dict(sorted(self.unused_fields.items())),
            "not_read": dict(sorted(self.not_read.items())),
            "items": self.accounts.as_json(),
            "shards": self.shards,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counts:
        """Read the counts of a manifest. Raises KeyError or TypeError if it is not one."""
        counters = {key: Counter(content[key]) for key in ("domains", "rejected", "unused_fields")}
        counters["not_read"] = Counter(content.get("not_read", {}))  # manifests of earlier versions have neither this
        accounts = Accounts.from_json(content.get("items", {}))  # nor this
        return cls(samples=content["samples"], shards=content["shards"], accounts=accounts, **counters)


def done_record(out: Path, task: int) -> Path:
    """Return the path of the file that says that a task is done."""
    return out / WORK / f"task-{task:05d}.json"


def rejected_part(out: Path, task: int) -> Path:
    """Return the path of the lines that a task adds to rejected.jsonl."""
    return out / WORK / f"task-{task:05d}.rejected.jsonl"


def reading_note(out: Path, task: int) -> Path:
    """Return the path of a task's note of its position."""
    return out / WORK / f"task-{task:05d}.reading"


def try_again(job: TaskJob, how: str, deaths: Deaths) -> TaskJob | None:
    """Return the task to do after its worker died, for an executor. None: do not try it again."""
    position = take_position(reading_note(Path(job.options.out), job.task.number))
    crash = deaths.record(job.task, position, how)
    if job.task.number in deaths.given_up:
        return None
    return replace(job, crashes=(*job.crashes, crash)) if crash else job


def write_task(job: TaskJob) -> Counts:
    """Do one task.

    Raises:
        DataError, OSError: for causes that are not in a sample, such as a full disk.
    """
    out, number = Path(job.options.out), job.task.number
    for left_over in (out / WORK).glob(f"task-{number:05d}-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    folder = out / WORK / f"task-{number:05d}-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    counts = Counts()
    shards = _Shards(folder, job.options, number)
    note = ReadingNote(reading_note(out, number))
    with replacing(rejected_part(out, number)) as rejected, open(rejected, "w", encoding="utf-8") as rejections:
        for found in _read(job, note, counts):
            try:
                if isinstance(found, Rejected):
                    raise BadSample(found.reason, found.detail)
                record, measured = _checked(found, job.options)
                stored = _stored(record)
            except BadSample as error:
                counts.reject(found, error.reason)
                write_rejected(rejections, error.reason, found.origin, error.detail)
            else:
                counts.take(found, record, measured.domain)
                shards.add(stored, found, measured)
        note.remove()  # a death from here on has no unit as its cause
        counts.shards = shards.close()
        for shard in counts.shards:
            tar = folder / shard["file"]
            for path in filter(Path.is_file, (tar, facts_path(tar), index_path(tar))):
                os.replace(path, out / path.name)
        sync_folder(out)
    write_json(done_record(out, number), counts.as_json())
    shutil.rmtree(folder, ignore_errors=True)
    return counts


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_rejected(file: TextIO, reason: str, origin: str, detail: str) -> None:
    """Write one line of rejected.jsonl."""
    unused = UnusedSample(reason, printable(detail), origin=printable(origin))
    file.write(json.dumps(unused.as_json(), ensure_ascii=False) + "\n")


@lru_cache(maxsize=2)
def load_tokenizer(folder: str) -> GlmTokenizer | None:
    """Load a tokenizer once per process. None for an empty name."""
    return GlmTokenizer(folder) if folder else None


def chat_form_of(asked: str, tokenizer: GlmTokenizer | None) -> str:
    """Return the form in which chats are written: the one asked for, or that of the tokenizer's models.

    Raises:
        DataError: The models do not write chats in the form that is asked for.
    """
    return choose_chat_form(asked, tokenizer.generation) if tokenizer else asked or DEFAULT_FORM


def _read(job: TaskJob, note: ReadingNote, counts: Counts) -> Iterator[Draft | Rejected]:
    """Yield what becomes a sample or a line of rejected.jsonl. Counts what is given, and what is not read."""
    crashes = {crash.position: crash.how for crash in job.crashes}
    for number, (given, unit) in enumerate(job.task.units):
        here = ReadingPosition(number, READING)
        if here in crashes:
            span = f"{unit.start} to {unit.stop} of it" if unit.stop else "all of it"
            yield Rejected(unit.path, "crashed_reader", f"its reader died twice ({crashes[here]}): {span} is rejected")
            continue
        note.at(here)
        before = counts.accounts
        counts.accounts = Accounts()
        try:
            counts.accounts.give(job.inputs[given].given(unit))
            for count, found in enumerate(job.inputs[given].read(unit)):
                position = ReadingPosition(number, count)
                if isinstance(found, NotRead):
                    counts.skip(found)
                elif position in crashes:
                    detail = f"its decoder died twice ({crashes[position]})"
                    yield Rejected(found.origin, "crashed_reader", detail, found.items, found.given)
                else:
                    note.at(position)
                    yield found
                    note.at(here)
        except BadSample as error:
            yield Rejected(unit.path, error.reason, error.detail, counts.accounts.missing())
        except (DataError, OSError, MemoryError):
            raise
        except Exception as error:  # a library's bug on one file must not end a build of days
            detail = f"{type(error).__name__}: {error}; the rest of it is not read"
            yield Rejected(unit.path, "unreadable_input", detail, counts.accounts.missing())
        counts.accounts.check(unit.path)
        before.add(counts.accounts)
        counts.accounts = before


def _checked(draft: Draft, options: BuildOptions) -> tuple[dict[str, Any], Measured]:
    """Return the record as it is stored, and the measured sample. Raises BadSample."""
    record = dict(draft.record)
    if "source" in record:
        record["given_source"] = record.pop("source")
    record["source"] = printable(draft.origin)
    for kind, files in (("image", draft.images), ("video", draft.videos)):
        for file in files:
            check_size(kind, len(file.data))
    raw = RawSample(record, [file.data for file in draft.images], [file.data for file in draft.videos])
    measured = measure(raw, load_tokenizer(options.tokenizer), options.chat_form, whole=True)
    if measured.prompt and options.check_prompt:
        options.check_prompt(measured.prompt)
    return record, measured


def _stored(record: dict[str, Any]) -> bytes:
    """Return the bytes of KEY.json. JSON has no NaN and no infinity: they become null. Raises BadSample."""
    try:
        written = json.dumps(record, ensure_ascii=False)
        if any(word in written for word in ("NaN", "Infinity")):
            written = json.dumps(json.loads(written, parse_constant=lambda _: None), ensure_ascii=False)
        data = written.encode()
    except (TypeError, ValueError, RecursionError) as error:  # among others, half of a surrogate pair ("\ud83d")
        raise BadSample("bad_record", f"the record cannot be written: {error}") from error
    check_size("json", len(data))
    return data


def check_size(kind: str, size: int) -> None:
    """Check that a member of this size can be read back. Raises BadSample."""
    if size > MAX_BYTES[kind]:
        raise BadSample(
            "member_too_large", f"a member of kind {kind} has {size:,} bytes, {MAX_BYTES[kind]:,} are allowed"
        )


class _Shards:
    """The shards of a task, written one after the other to a folder, each with its index."""

    def __init__(self, folder: Path, options: BuildOptions, task: int) -> None:
        self.options, self.task = options, task
        self.samples = 0
        self._writer = ShardWriter(folder, f"{options.name}-{task:05d}", options.shard_bytes)
        self._rows: list[dict[str, Any]] = []
        self._facts: list[FactsRow] = []
        self._finished: list[dict[str, Any]] = []

    def add(self, record: bytes, draft: Draft, measured: Measured) -> None:
        files = [("json", record)]
        for media in (draft.images, draft.videos):
            files += [(f"{number}.{file.extension}", file.data) for number, file in enumerate(media)]
        sample = self._writer.write(f"{self.task:05d}-{self.samples:06d}", files)
        self._index_finished()
        self._rows.append(measured.index_row(sample))
        self._facts += measured.facts_rows(sample)
        self.samples += 1

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard. Returns what the manifest says of all of them."""
        self._writer.close()
        self._index_finished()
        return self._finished

    def _index_finished(self) -> None:
        """Write the index of the shard that the writer has just finished, if it has finished one."""
        if len(self._writer.finished) == len(self._finished):
            return
        path = self._writer.finished[-1]
        tokenizer = load_tokenizer(self.options.tokenizer)
        write_facts(path, self._facts)
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
        self._rows, self._facts = [], []
