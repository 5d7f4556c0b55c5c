"""One task of a build: its units are read, checked, measured and written to shards of its own.

    out/.build/task-00007-1f03.../     what is being written; removed when the task is begun anew
    out/shard-00007-00.tar             renamed from there when the whole task is written, and its index with it
    out/.build/task-00007.json         the done record, renamed last: without it the task is not done

So whoever is killed, at whatever moment, leaves a task done or not done, and doing it again gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.errors import BadSample, DataError
from data_pipeline.index import index_path, index_row, write_index
from data_pipeline.inputs.draft import Draft, Input, Rejected
from data_pipeline.shards import RawSample
from data_pipeline.sharding.measure import KNOWN_FIELDS, Measured, measure
from data_pipeline.sharding.tar_writer import END, TarWriter, tar_size
from data_pipeline.sharding.tasks import BuildOptions, Task
from data_pipeline.tokens import GlmTokenizer

WORK = ".build"


@dataclass(frozen=True)
class TaskJob:
    """A task with all that it takes to do it in any process. inputs: those that its units are of, by number."""

    task: Task
    inputs: dict[int, Input]
    options: BuildOptions


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


def write_task(job: TaskJob) -> Counts:
    """Does one task. Raises DataError or OSError where no sample is to blame."""
    out, number = Path(job.options.out), job.task.number
    for left_over in (out / WORK).glob(f"task-{number:05d}-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    folder = out / WORK / f"task-{number:05d}-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    counts = Counts()
    shards = _Shards(folder, job.options, number)
    with open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejections:
        for draft in _drafts(job):
            try:
                if isinstance(draft, Rejected):
                    raise BadSample(draft.reason, draft.detail)
                record, measured = _checked(draft, job.options)
            except BadSample as error:
                counts.rejected[error.reason] += 1
                write_rejected(rejections, error.reason, draft.origin, error.detail)
            else:
                counts.samples += 1
                counts.domains[measured.domain] += 1
                counts.unused_fields.update(record.keys() - KNOWN_FIELDS)
                shards.add(record, draft, measured)
    counts.shards = shards.close()
    for shard in counts.shards:
        os.replace(folder / shard["file"], out / shard["file"])
        os.replace(index_path(folder / shard["file"]), index_path(out / shard["file"]))
    os.replace(folder / "rejected.jsonl", rejected_part(out, number))
    write_json(done_record(out, number), counts.as_json())
    shutil.rmtree(folder, ignore_errors=True)
    return counts


def write_rejected(file: TextIO, reason: str, origin: str, detail: str) -> None:
    line = json.dumps({"reason": reason, "origin": origin, "detail": detail}, ensure_ascii=False)
    file.write(line.encode("utf-8", "backslashreplace").decode() + "\n")


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@lru_cache(maxsize=2)
def load_tokenizer(folder: str) -> GlmTokenizer | None:
    return GlmTokenizer(folder) if folder else None


def _drafts(job: TaskJob) -> Iterator[Draft | Rejected]:
    for number, unit in job.task.pieces:
        try:
            yield from job.inputs[number].read(unit)
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
    record["source"] = draft.origin
    raw = RawSample(record, [file.data for file in draft.images], [file.data for file in draft.videos])
    return record, measure(raw, load_tokenizer(options.tokenizer), options.chat_form, whole=True)


class _Shards:
    """The shards of a task, one after the other in a folder, each with its index."""

    def __init__(self, folder: Path, options: BuildOptions, task: int):
        self.folder, self.options, self.task = folder, options, task
        self.finished: list[dict[str, Any]] = []
        self._samples = 0
        self._tar: TarWriter | None = None
        self._rows: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any], draft: Draft, measured: Measured) -> None:
        files = [("json", json.dumps(record, ensure_ascii=False).encode())]
        for media in (draft.images, draft.videos):
            files += [(f"{number}.{file.extension}", file.data) for number, file in enumerate(media)]
        if self._tar is not None and self._tar.size + tar_size(files) + len(END) > self.options.shard_bytes:
            self._finish()
        if self._tar is None:
            self._tar = TarWriter(self._path)
        sample = self._tar.add(f"{self.task:05d}-{self._samples:06d}", files)
        self._samples += 1
        self._rows.append(
            index_row(
                *(sample, measured.domain, measured.text_tokens),
                *(measured.images, measured.videos, measured.blocks),
            )
        )

    def close(self) -> list[dict[str, Any]]:
        if self._tar is not None:
            self._finish()
        return self.finished

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.options.name}-{self.task:05d}-{len(self.finished):02d}.tar"

    def _finish(self) -> None:
        assert self._tar is not None
        path, checksum = self._path, self._tar.close()
        tokenizer = load_tokenizer(self.options.tokenizer)
        write_index(
            path, self._rows, tokenizer_hash=tokenizer.hash if tokenizer else "", chat_form=self.options.chat_form
        )
        self.finished.append(
            {"file": path.name, "samples": len(self._rows), "bytes": path.stat().st_size, "sha256": checksum}
        )
        self._tar, self._rows = None, []
