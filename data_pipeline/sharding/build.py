"""Build a folder of shards from inputs, with any number of processes and machines, each task exactly once.

    out/.build/build.json          what is being built, until it is finished; writing.py describes the rest of .build
    out/shard-00000-00000.tar      with shard-00000-00000.index.arrow
    out/rejected.jsonl             {"reason", "origin", "detail"} of everything that did not become a sample
    out/catalogue.arrow            all indexes in one file
    out/manifest.json              what was built, from what, with counts and checksums; written last

Two builds of the same input with the same options are equal byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.files import replacing, write_first, write_json
from data_pipeline.errors import REJECTED, DataError
from data_pipeline.inputs.draft import Input
from data_pipeline.inputs.kinds import skipped_files
from data_pipeline.sharding.crashes import Deaths
from data_pipeline.sharding.executors import ADVICE, EXECUTORS, Executor
from data_pipeline.sharding.job_slice import JobSlice
from data_pipeline.sharding.tasks import MANIFEST, BuildOptions, BuildPlan, check_same, open_apart, plan_build
from data_pipeline.sharding.writing import (
    WORK,
    Counts,
    TaskJob,
    chat_form_of,
    done_record,
    load_tokenizer,
    reading_note,
    rejected_part,
    try_again,
    write_task,
)
from data_pipeline.shards.catalogue import write_catalogue


@dataclass(frozen=True)
class Outcome:
    """How far a build is. The manifest is written when all tasks are done."""

    counts: Counts  # of all tasks that are done
    done: int  # tasks that are done
    tasks: int  # all tasks
    was_finished: bool = False  # nothing was left to do

    @property
    def finished(self) -> bool:
        """Return whether all tasks are done."""
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
    """Build shards in one call. See open_inputs, BuildOptions and EXECUTORS for the arguments."""
    given = [str(path) for path in paths]
    inputs = open_apart(given, str(out), kind, settings)
    planned = plan(inputs, BuildOptions(str(out), str(tokenizer), **options), skipped_files(given, inputs))
    return run_build(planned, executor=executor, workers=workers)


def plan(
    inputs: Sequence[tuple[str, Input]], options: BuildOptions, skipped: Mapping[str, int] = MappingProxyType({})
) -> BuildPlan:
    """Plan a build. `skipped` counts files that no input reads.

    Raises:
        DataError: The tokenizer or an input cannot be read, or its models do not write chats in the form of `options`.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    options = replace(options, chat_form=chat_form_of(options.chat_form, tokenizer))
    return plan_build(inputs, options, tokenizer.hash if tokenizer else "", skipped)


def run_build(
    plan: BuildPlan, *, executor: str = "here", workers: int = 1, job_slice: JobSlice | None = None
) -> Outcome:
    """Do the tasks that are not done, and finish the build if none is left.

    Args:
        plan: What to build.
        executor: One of EXECUTORS.
        workers: The number of processes.
        job_slice: Do this slice of the tasks. None: all.

    Raises:
        DataError: the folder holds another build, or a task cannot be done. What is done stays done.
    """
    out = Path(plan.options.out)
    if not (out / MANIFEST).is_file():
        try:
            outcome = _run(plan, EXECUTORS[executor], workers, job_slice or JobSlice())
        except FileNotFoundError:  # another job has finished the build and removed its records
            if not (out / MANIFEST).is_file():
                raise
        else:
            if outcome.finished or not (out / MANIFEST).is_file():
                return outcome
    return _was_finished(plan, out)


def _run(plan: BuildPlan, run: Executor, workers: int, job_slice: JobSlice) -> Outcome:
    out = Path(plan.options.out)
    _begin(plan, out)
    jobs = [
        TaskJob(task, {number: plan.inputs[number][1] for number, _ in task.units}, plan.options)
        for task in job_slice.of(plan.tasks)
        if not done_record(out, task.number).is_file()
    ]
    for job in jobs:
        reading_note(out, job.task.number).unlink(missing_ok=True)  # of a run that was killed
    deaths = Deaths()
    for _ in run(write_task, jobs, workers=workers, died=partial(try_again, deaths=deaths)):
        pass
    if deaths.given_up:
        raise DataError(f"{'; '.join(deaths.given_up.values())}. {ADVICE}")
    done = [task.number for task in plan.tasks if done_record(out, task.number).is_file()]
    total = Counts(not_read=Counter(plan.skipped))
    for number in done:
        total.add(Counts.from_json(json.loads(done_record(out, number).read_text(encoding="utf-8"))))
    if len(done) == len(plan.tasks):
        _finish(plan, out, total)
    return Outcome(total, len(done), len(plan.tasks))


def written_bytes(out: Path) -> int:
    """Return the bytes of all shards, finished or not: the progress of a build."""
    total = 0
    for pattern in ("*.tar", f"{WORK}/*/*.tar*"):
        for tar in out.glob(pattern):
            try:
                total += tar.stat().st_size
            except FileNotFoundError:  # renamed meanwhile
                continue
    return total


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder of shards, or None. Raises DataError if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        Counts.from_json(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): restore it, or remove the folder and build again") from error
    return manifest


def _begin(plan: BuildPlan, out: Path) -> None:
    begun = out / WORK / "build.json"
    begun.parent.mkdir(parents=True, exist_ok=True)
    if not begun.is_file() and (others := sorted(out.glob("*.tar"))):
        raise DataError(
            f"{others[0]} does not belong to this build: choose an empty folder for --out, or remove the file"
        )
    try:
        content = json.loads(write_first(begun, json.dumps(plan.description, ensure_ascii=False)))
    except ValueError as error:
        raise DataError(f"{begun} is damaged: remove {out} and build again") from error
    check_same(content, plan.description, out)


def _was_finished(plan: BuildPlan, out: Path) -> Outcome:
    manifest = read_manifest(out)
    assert manifest is not None
    check_same(manifest, plan.description, out)
    _clean(out)
    return Outcome(Counts.from_json(manifest), len(plan.tasks), len(plan.tasks), was_finished=True)


def _finish(plan: BuildPlan, out: Path, counts: Counts) -> None:
    """Write the files that describe the whole build. Jobs that do this at the same time write the same bytes."""
    with replacing(out / REJECTED) as temporary, open(temporary, "wb") as whole:
        for task in plan.tasks:
            with open(rejected_part(out, task.number), "rb") as part:
                shutil.copyfileobj(part, whole)
    write_catalogue(out)
    write_json(out / MANIFEST, {**plan.description, **counts.as_json()})
    _clean(out)


def _clean(out: Path) -> None:
    """Remove what a finished build no longer needs, and temporary files of one that was killed while finishing."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for name in ("catalogue", REJECTED, MANIFEST):
        for left_over in out.glob(f"{name}.*.tmp"):
            left_over.unlink(missing_ok=True)
