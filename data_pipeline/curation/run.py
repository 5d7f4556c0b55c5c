"""Curation: shards and a recipe -> shards of the kept samples, and a report of all others.

    out/curated-00000-00.tar ...    the kept samples, with indexes, catalogue and manifest, as every build writes them
    out/filtered.jsonl              one line per filtered sample: errors.UnusedSample
    out/reported.jsonl              the same for filters with report_only
    out/recaption_failed.jsonl      {"sample", "reason"} of chosen samples that keep their caption
    out/funnel.json, funnel.png     how many samples remain after every filter, as numbers and as a chart
    out/recipe.yaml                 the recipe with all defaults
    out/.curation/                  may be deleted after the end:
        begun.json                      what is being curated
        examined-00000.arrow            results of the first pass for one shard
        writer                          the part that decides and writes, such as 3/8, if several share the work
        recaption/                      answers

There are three passes: `examine` (each shard alone, by any number of processes and machines), `decide` (one process,
over small features), and a build of the kept samples. Each resumes after a crash, and none of the files depends on the
number of processes or of parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import write_first, write_json, write_text
from data_pipeline.curation.decide import FILTERED, Examined, Funnel, decide
from data_pipeline.curation.examine import ShardTask, examine_shard
from data_pipeline.curation.hashing import digest
from data_pipeline.curation.kept import KeptSamples, recaption_notes, units_of
from data_pipeline.curation.recipe import Recipe
from data_pipeline.curation.report import draw_funnel, funnel_json
from data_pipeline.errors import DataError
from data_pipeline.inputs.names import shown_names
from data_pipeline.sharding.build import plan, run_build, written_bytes
from data_pipeline.sharding.executors import EXECUTORS
from data_pipeline.sharding.job_slice import JobSlice
from data_pipeline.sharding.tasks import MANIFEST, BuildOptions
from data_pipeline.sharding.writing import chat_form_of, load_tokenizer
from data_pipeline.shards.index import IndexHeader, read_index

WORK = ".curation"
# Key of begun.json -> how a message calls it.
_DESCRIPTIONS = {
    "recipe": "recipe, or a file that it names has changed",
    "shards": "set of shards",
    "tokenizer": "tokenizer",
}
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
ProgressOfBytes = Callable[[int, Callable[[], int]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Unfinished:
    """The part of this process is examined, and other parts are to do the rest."""

    examined: int  # shards examined by any part
    shards: int  # all shards
    writer: str = ""  # the part that decides and writes; empty until all shards are examined


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
    """Apply a recipe to indexed shards, and write the kept samples.

    Args:
        shards: Tars with indexes. Of two similar samples the first in this order is kept.
        out: Output folder.
        recipe: The filters.
        tokenizer: A tokenizer folder, for the indexes of the new shards; empty: without token counts.
        executor: A name of EXECUTORS.
        workers: Number of processes.
        job_slice: The shards to examine here. The first job that finds all examined decides and writes.
        progress: Called with (label, total); returns a context whose value is called once per finished shard.
        progress_of_bytes: Called with (total, written); returns a context that calls `written` from time to time.

    Returns:
        The counts, or how far the parts are.

    Raises:
        DataError: A shard has no index, `out` contains another curation, no sample is kept, or the tokenizer is that of
            models that write chats in another form than the shards.
    """
    paths = tuple(dict.fromkeys(str(shard) for shard in shards))
    headers = {path: read_index(Path(path)).header for path in paths}
    chat_form = chat_form_of(_chat_form(headers), load_tokenizer(tokenizer))
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
    # Several parts may find this at the same time; only one of them writes the shards. Afterwards any part may finish.
    if job_slice and not (out / MANIFEST).is_file():
        name = str(job_slice)
        if (writer := write_first(work / "writer", name)) != name:
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
    """Run the second and the third pass, and write the report."""
    out = Path(options.out)
    recaption = out / WORK / "recaption"
    kept, funnel = decide(examined, recipe, out)
    if not kept.any():
        raise DataError(f"no sample is kept: {out / FILTERED} says why each was filtered")
    paths = tuple(task.shard for task in examined.tasks)
    recaption_options = asdict(recipe.recaption) if recipe.recaption else {}
    samples = KeptSamples(paths, recaption_options, units_of(examined, kept), recaption)
    build = plan([("curated", samples)], options)
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
    write_json(out / "funnel.json", funnel_json(funnel))
    draw_funnel(funnel, out / "funnel.png")
    return funnel


def _chat_form(headers: dict[str, IndexHeader]) -> str:
    """Return the chat form of the shards. Raises DataError if they differ."""
    forms = {header.chat_form: path for path, header in headers.items()}
    if len(forms) > 1:
        raise DataError(
            f"these shards write chats in different forms: {', '.join(forms.values())}; curate them separately"
        )
    return next(iter(forms))


def _begin(path: Path, recipe: Recipe, shards: dict[str, IndexHeader], tokenizer: str) -> None:
    """Write down what is being curated, with `shards` by name. Raises DataError if the folder contains another one."""
    tars = {name: header.tar_fingerprint for name, header in shards.items()}
    encoder = load_tokenizer(tokenizer)  # reports a wrong path now, not after all shards are examined
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
            raise DataError(
                f"{out} was begun with another {_DESCRIPTIONS[what]}: choose another --out, or remove {out}"
            )
