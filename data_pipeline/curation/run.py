"""Curating: shards and a recipe -> the shards that stay, and an account of all that went.

    out/curated-00000-00.tar ...    what stays, with indexes, catalogue and manifest, as every build writes them
    out/filtered.jsonl               {"shard", "key", "filter", "reason", "detail"} of every sample that went
    out/reported.jsonl              the same of what filters found that only report
    out/recaption_failed.jsonl      {"sample", "reason"} of those that keep their caption although they were chosen
    out/funnel.json, funnel.png     how many samples every filter took, as numbers and as a picture
    out/recipe.yaml                 the recipe, all defaults written out
    out/.curation/                  may be deleted when all is done:
        begun.json                      what is being curated
        examined-00000.arrow            what the first pass found in a shard
        writer                          the part that decides and writes, as 3/8, where several share the work
        recaption/                      answers

Three passes: `examine` (every shard alone, by any number of processes and machines), `decide` (one process, over small
features), and a build of what is kept. Each goes on where it was when it was killed, and none of the files depends on
the number of processes, or of parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import write_first, write_text
from data_pipeline.curation.decide import Examined, Funnel, decide
from data_pipeline.curation.examine import ShardTask, examine_shard
from data_pipeline.curation.hashing import digest
from data_pipeline.curation.kept import KeptSamples, recaption_notes, units_of
from data_pipeline.curation.recipe import Recipe
from data_pipeline.curation.report import draw_funnel, funnel_json
from data_pipeline.errors import DataError
from data_pipeline.inputs.names import shown_names
from data_pipeline.sharding.build import MANIFEST, JobSlice, plan, run_build, written_bytes
from data_pipeline.sharding.executors import EXECUTORS
from data_pipeline.sharding.tasks import BuildOptions
from data_pipeline.sharding.writing import load_tokenizer
from data_pipeline.shards.index import IndexHeader, read_index

WORK = ".curation"
_CALLED = {
    "recipe": "recipe, or a file that it names has changed",
    "shards": "set of shards",
    "tokenizer": "tokenizer",
}
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
ProgressOfBytes = Callable[[int, Callable[[], int]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Unfinished:
    """A part is examined, and the rest is up to others. examined: how many of `shards` are; writer: the part that
    decides and writes, which is empty until all are."""

    examined: int
    shards: int
    writer: str = ""


def curate(
    shards: Sequence[Path],
    out: Path,
    recipe: Recipe,
    *,
    tokenizer: str = "",
    executor: str = "here",
    workers: int = 1,
    job_slice: JobSlice | None = None,
    progress: Progress,
    progress_of_bytes: ProgressOfBytes,
) -> Funnel | Unfinished:
    """Runs a recipe over indexed shards; the order in which they are given decides which of two alike samples is the
    first, and stays.

    tokenizer: a folder, for the indexes of what is written. part: the shards that are examined here; whoever finds all
    of them examined first also decides and writes. progress(what, total) gives a context whose value is called for
    every one done; progress_of_bytes(total, written) one that asks `written` now and then. Raises DataError if a shard
    has no index, or `out` holds something else.
    """
    paths = tuple(dict.fromkeys(str(shard) for shard in shards))
    headers = {path: read_index(Path(path)).header for path in paths}
    chat_form = _chat_form(headers)
    work = out / WORK
    (work / "recaption").mkdir(parents=True, exist_ok=True)
    shown = shown_names(paths)
    _begin(work / "begun.json", recipe, {shown[path]: headers[path] for path in paths}, tokenizer)
    tasks = [
        ShardTask(path, shown[path], recipe.text(), str(work / f"examined-{number:05d}.arrow"))
        for number, path in enumerate(paths)
    ]
    own = job_slice.of(tasks) if job_slice else tasks
    with progress("shards examined", len(own)) as tick:
        for _ in EXECUTORS[executor](examine_shard, own, workers=workers):
            tick()
    done = sum(task.done for task in tasks)
    if done < len(tasks):
        return Unfinished(done, len(tasks))
    # Several jobs may find this at the same time, but only one command writes the shards.
    if (
        job_slice
        and not (out / MANIFEST).is_file()
        and (writer := write_first(work / "writer", str(job_slice))) != str(job_slice)
    ):
        return Unfinished(done, len(tasks), writer)
    options = BuildOptions(str(out), tokenizer, name="curated", shard_bytes=recipe.shard_bytes, chat_form=chat_form)
    return _write(Examined(tasks), recipe, options, executor, workers, progress_of_bytes)


def _write(
    examined: Examined,
    recipe: Recipe,
    options: BuildOptions,
    executor: str,
    workers: int,
    progress_of_bytes: ProgressOfBytes,
) -> Funnel:
    """The second and third pass, and the account of all."""
    out = Path(options.out)
    recaption = out / WORK / "recaption"
    stays, funnel = decide(examined, recipe, out)
    if not stays.any():
        raise DataError(f"not one sample stays: {out / 'filtered.jsonl'} says why each went")
    paths = tuple(task.shard for task in examined.tasks)
    asked = asdict(recipe.recaption) if recipe.recaption else {}
    kept = KeptSamples(paths, asked, units_of(examined, stays), recaption)
    build = plan([("curated", kept)], options)
    with progress_of_bytes(build.bytes, lambda: written_bytes(out)):
        counts = run_build(build, executor=executor, workers=workers).counts
    funnel.kept, funnel.unwritten = counts.domains, counts.rejected
    funnel.recaptioned, funnel.recaption_failures = recaption_notes(recaption)
    if recipe.recaption:
        lines = [{"sample": name, "reason": reason} for name, reason in funnel.recaption_failures]
        write_text(
            out / "recaption_failed.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
    write_text(out / "recipe.yaml", recipe.text())
    write_text(out / "funnel.json", json.dumps(funnel_json(funnel), indent=1, ensure_ascii=False) + "\n")
    draw_funnel(funnel, out / "funnel.png")
    return funnel


def _chat_form(headers: dict[str, IndexHeader]) -> str:
    """In which form all of the shards write chats. Raises DataError if they differ."""
    forms = {header.chat_form: path for path, header in headers.items()}
    if len(forms) > 1:
        raise DataError(f"chats are written in different forms: {', '.join(forms.values())}; curate them apart")
    return next(iter(forms))


def _begin(path: Path, recipe: Recipe, shards: dict[str, IndexHeader], tokenizer: str) -> None:
    """Remembers what is being curated, `shards` by name. Raises DataError if it was something else."""
    tars = {name: header.tar_fingerprint for name, header in shards.items()}
    encoder = load_tokenizer(tokenizer)  # a mistake in its path is found here and not when all is examined
    now = {
        "recipe": recipe.fingerprint(),
        "shards": digest(json.dumps(tars).encode()).hex(),
        "tokenizer": encoder.hash if encoder else "",
    }
    out = path.parent.parent
    try:
        begun = json.loads(write_first(path, json.dumps(now)))
    except ValueError as error:
        raise DataError(f"{path} is damaged: remove {out} and curate again") from error
    for what in now:
        if begun.get(what) != now[what]:
            raise DataError(f"{out} was begun with another {_CALLED[what]}: choose another --out, or remove it")
