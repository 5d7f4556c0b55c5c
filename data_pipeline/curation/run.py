"""Curating: shards and a recipe -> the shards that stay, and an account of all that went.

    out/curated-00000-00.tar ...    what stays, with indexes, catalogue and manifest, as every build writes them
    out/dropped.jsonl               {"shard", "key", "filter", "reason", "detail"} of every sample that went
    out/reported.jsonl              the same of what filters found that only report
    out/recaption_failed.jsonl      {"sample", "reason"} of those that keep their caption although they were chosen
    out/funnel.json, funnel.png     how many samples every filter took, as numbers and as a picture
    out/recipe.yaml                 the recipe, all defaults written out
    out/.curation/                  what the first pass found, and recaptions; may be deleted when all is done

Three passes: `examine` (every shard alone, by any number of processes), `decide` (one process, over small features),
and a build of what is kept. Each goes on where it was when it was killed, and none of the files depends on the number
of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from data_pipeline.curation.decide import Examined, Funnel, decide
from data_pipeline.curation.examine import ShardTask, examine_shard
from data_pipeline.curation.hashing import digest
from data_pipeline.curation.kept import KeptSamples, recaption_notes, units_of
from data_pipeline.curation.recipe import Recipe
from data_pipeline.curation.report import draw_funnel, funnel_json
from data_pipeline.errors import DataError
from data_pipeline.files import write_text
from data_pipeline.index import read_index
from data_pipeline.inputs.names import shown_names
from data_pipeline.sharding.build import plan, run_build, written_bytes
from data_pipeline.sharding.executors import EXECUTORS
from data_pipeline.sharding.tasks import BuildOptions

WORK = ".curation"
_CALLED = {"recipe": "recipe, or a file that it names has changed", "shards": "set of shards"}
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
ProgressOfBytes = Callable[[int, Callable[[], int]], AbstractContextManager[None]]


def curate(
    shards: Sequence[Path],
    out: Path,
    recipe: Recipe,
    *,
    tokenizer: str = "",
    executor: str = "here",
    workers: int = 1,
    progress: Progress,
    progress_of_bytes: ProgressOfBytes,
) -> Funnel:
    """Runs a recipe over indexed shards; the order in which they are given decides which of two alike samples is the
    first, and stays.

    tokenizer: a folder, for the indexes of what is written. progress(what, total) gives a context whose value is called
    for every one done; progress_of_bytes(total, written) one that asks `written` now and then. Raises
    DataError if a shard has no index, or `out` holds something else.
    """
    paths = tuple(dict.fromkeys(str(shard) for shard in shards))
    chat_form = _chat_form(paths)
    work = out / WORK
    (work / "recaption").mkdir(parents=True, exist_ok=True)
    shown = shown_names(paths)
    _begin(work / "begun.json", recipe, shown)
    tasks = [
        ShardTask(path, shown[path], recipe.text(), str(work / f"examined-{number:05d}.arrow"))
        for number, path in enumerate(paths)
    ]
    with progress("shards examined", len(tasks)) as tick:
        for _ in EXECUTORS[executor](examine_shard, tasks, workers=workers):
            tick()
    examined = Examined(tasks)
    stays, funnel = decide(examined, recipe, out)
    if not stays.any():
        raise DataError(f"not one sample stays: {out / 'dropped.jsonl'} says why each went")
    kept = KeptSamples(
        paths, asdict(recipe.recaption) if recipe.recaption else {}, units_of(examined, stays), work / "recaption"
    )
    options = BuildOptions(str(out), tokenizer, name="curated", shard_bytes=recipe.shard_bytes, chat_form=chat_form)
    build = plan([("curated", kept)], options)
    with progress_of_bytes(build.bytes, lambda: written_bytes(out)):
        counts = run_build(build, executor=executor, workers=workers).counts
    funnel.kept, funnel.unwritten = counts.domains, counts.rejected
    funnel.recaptioned, funnel.recaption_failures = recaption_notes(work / "recaption")
    if recipe.recaption:
        lines = [{"sample": name, "reason": reason} for name, reason in funnel.recaption_failures]
        write_text(
            out / "recaption_failed.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
    write_text(out / "recipe.yaml", recipe.text())
    write_text(out / "funnel.json", json.dumps(funnel_json(funnel), indent=1, ensure_ascii=False) + "\n")
    draw_funnel(funnel, out / "funnel.png")
    return funnel


def _chat_form(paths: Sequence[str]) -> str:
    """In which form all of the shards write chats. Raises DataError if they differ."""
    forms = {read_index(Path(path)).header.chat_form: path for path in paths}
    if len(forms) > 1:
        raise DataError(f"chats are written in different forms: {', '.join(forms.values())}; curate them apart")
    return next(iter(forms))


def _begin(path: Path, recipe: Recipe, shards: dict[str, str]) -> None:
    """Remembers what is being curated, `shards` as {path: name}. Raises DataError if it was something else."""
    tars = {name: read_index(Path(shard)).header.tar_fingerprint for shard, name in shards.items()}
    now = {"recipe": recipe.fingerprint(), "shards": digest(json.dumps(tars).encode()).hex()}
    if not path.is_file():
        write_text(path, json.dumps(now))
        return
    begun = json.loads(path.read_text())
    for what in now:
        if begun.get(what) != now[what]:
            raise DataError(
                f"{path.parent.parent} was begun with another {_CALLED[what]}: choose another --out, or remove it"
            )
