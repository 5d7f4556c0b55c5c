"""Inputs to a folder of shards, by as many processes and machines as there are, done once however often it is begun.

    out/.build/build.json       what is being built, until it is finished; see writing.py for the rest of .build
    out/shard-00000-00000.tar      with shard-00000-00000.index.arrow
    out/rejected.jsonl          {"reason", "origin", "detail"} of everything that did not become a sample
    out/catalogue.arrow         all indexes in one
    out/manifest.json           what was built, of what, with counts and checksums; written last

Two builds of the same input with the same options are the same byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from common.files import write_first
from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Input
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.sharding.crashes import Deaths
from data_pipeline.sharding.executors import EXECUTORS, MEND, Executor
from data_pipeline.sharding.tasks import BuildOptions, Plan, check_same, plan_build
from data_pipeline.sharding.writing import (
    WORK,
    Counts,
    TaskJob,
    done_record,
    load_tokenizer,
    reading_note,
    rejected_part,
    try_again,
    write_json,
    write_task,
)
from data_pipeline.shards.catalogue import REJECTED, write_catalogue

MANIFEST = "manifest.json"
Work = TypeVar("Work")


@dataclass(frozen=True)
class Part:
    """The tasks that one of `count` members does: those whose number is `index` modulo `count`. As text 3/8."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"--part {self.index}/{self.count}: give one part or more, as 0/1")
        if not 0 <= self.index < self.count:
            raise DataError(f"--part {self}: parts of {self.count} are 0 to {self.count - 1}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, tasks: Sequence[Work]) -> Sequence[Work]:
        return tasks[self.index :: self.count]


@dataclass(frozen=True)
class Outcome:
    """counts: of all tasks that are done. done, tasks: how many; the manifest is written when all are.
    was_finished: nothing was left to do."""

    counts: Counts
    done: int
    tasks: int
    was_finished: bool = False

    @property
    def finished(self) -> bool:
        return self.done == self.tasks


def build_shards(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path = "",
    kind: str = "",
    settings: Sequence[str] = (),
    executor: str = "here",
    workers: int = 1,
    **options: Any,
) -> Outcome:
    """A whole build in one call: see inputs.open_inputs, BuildOptions and EXECUTORS for what may be given."""
    inputs = open_apart([str(path) for path in paths], str(out), kind, settings)
    return run_build(
        plan(inputs, BuildOptions(str(out), str(tokenizer), **options)), executor=executor, workers=workers
    )


def open_apart(paths: Sequence[str], out: str, kind: str = "", settings: Sequence[str] = ()) -> list[tuple[str, Input]]:
    """inputs.open_inputs for a build into `out`, which may not lie in an input: it would be read as one."""
    for path in paths:
        if Path(out).resolve().is_relative_to(Path(path).resolve()):
            raise DataError(f"--out {out} lies in the input {path}: choose a folder beside it")
    return open_inputs(paths, kind, settings)


def plan(inputs: Sequence[tuple[str, Input]], options: BuildOptions) -> Plan:
    """What is to be built. Raises DataError."""
    tokenizer = load_tokenizer(options.tokenizer)
    return plan_build(inputs, options, tokenizer.hash if tokenizer else "")


def run_build(plan: Plan, *, executor: str = "here", workers: int = 1, part: Part | None = None) -> Outcome:
    """Does the tasks of a part (of all, without one) that are not done, and finishes the build if none is left.

    Raises DataError if the folder holds something else, or if a task cannot be done; what is done stays done."""
    out = Path(plan.options.out)
    if not (out / MANIFEST).is_file():
        try:
            outcome = _run(plan, EXECUTORS[executor], workers, part or Part())
        except FileNotFoundError:  # records that another member removed because it has finished the build
            if not (out / MANIFEST).is_file():
                raise
        else:
            if outcome.finished or not (out / MANIFEST).is_file():
                return outcome
    return _was_finished(plan, out)


def _run(plan: Plan, run: Executor, workers: int, part: Part) -> Outcome:
    out = Path(plan.options.out)
    _begin(plan, out)
    jobs = [
        TaskJob(task, {number: plan.inputs[number][1] for number, _ in task.pieces}, plan.options)
        for task in part.of(plan.tasks)
        if not done_record(out, task.number).is_file()
    ]
    for job in jobs:
        reading_note(out, job.task.number).unlink(missing_ok=True)  # of a run that was killed
    deaths = Deaths()
    for _ in run(write_task, jobs, workers=workers, died=partial(try_again, deaths=deaths)):
        pass
    if deaths.given_up:
        raise DataError(f"{'; '.join(deaths.given_up.values())}. {MEND}")
    done = [task.number for task in plan.tasks if done_record(out, task.number).is_file()]
    total = Counts()
    for number in done:
        total.add(Counts.from_json(json.loads(done_record(out, number).read_text(encoding="utf-8"))))
    if len(done) == len(plan.tasks):
        _finish(plan, out, total)
    return Outcome(total, len(done), len(plan.tasks))


def written_bytes(out: Path) -> int:
    """Bytes of the shards that are written and being written: how far a build is."""
    total = 0
    for pattern in ("*.tar", f"{WORK}/*/*.tar*"):
        for tar in out.glob(pattern):
            try:
                total += tar.stat().st_size
            except FileNotFoundError:  # renamed meanwhile
                continue
    return total


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards, None if it has none. Raises DataError if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        Counts.from_json(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): restore it, or remove the folder and build again") from error
    return manifest


def _begin(plan: Plan, out: Path) -> None:
    begun = out / WORK / "build.json"
    begun.parent.mkdir(parents=True, exist_ok=True)
    if not begun.is_file() and (strangers := sorted(out.glob("*.tar"))):
        raise DataError(f"{strangers[0]} was not built here: choose an empty folder for --out, or remove it")
    try:
        content = json.loads(write_first(begun, json.dumps(plan.description, ensure_ascii=False)))
    except ValueError as error:
        raise DataError(f"{begun} is damaged: remove {out} and build again") from error
    check_same(content, plan.description, out)


def _was_finished(plan: Plan, out: Path) -> Outcome:
    manifest = read_manifest(out)
    assert manifest is not None
    check_same(manifest, plan.description, out)
    _clean(out)
    return Outcome(Counts.from_json(manifest), len(plan.tasks), len(plan.tasks), was_finished=True)


def _finish(plan: Plan, out: Path, counts: Counts) -> None:
    """Writes what tells of the whole build. Members that do this at once write the same."""
    temporary = out / WORK / f"rejected.{uuid.uuid4().hex[:12]}.tmp"
    with open(temporary, "wb") as whole:
        for task in plan.tasks:
            with open(rejected_part(out, task.number), "rb") as piece:
                shutil.copyfileobj(piece, whole)
    os.replace(temporary, out / REJECTED)
    write_catalogue(out)
    manifest = out / WORK / f"manifest.{uuid.uuid4().hex[:12]}.tmp"
    write_json(manifest, {**plan.description, **counts.as_json()})
    os.replace(manifest, out / MANIFEST)
    _clean(out)


def _clean(out: Path) -> None:
    """Removes what a finished build no longer needs, and what was left of one killed while it was finishing."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for left_over in out.glob("catalogue.*.tmp"):
        left_over.unlink(missing_ok=True)
