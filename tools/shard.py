"""Build shards from data, and see what is in them.

    python -m tools.shard build  --input PATH... --out DIR --tokenizer DIR
    python -m tools.shard index  SHARDS... --tokenizer DIR
    python -m tools.shard verify SHARDS...
    python -m tools.shard stats  SHARDS... --plot stats.png
    python -m tools.shard curate SHARDS... --out DIR --recipe YAML --tokenizer DIR

SHARDS are folders of shards, .tar files or patterns. `COMMAND --help` says more; `build --help` lists the input kinds.

`build` and `curate` resume where they were stopped when the same command is given again. Many machines may share one
build: each does a part (--part 0/8 ... --part 7/8, or --array in a SLURM job array). The last one to finish writes the
manifest, or decides which samples stay and writes them.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.sizes import parse_size
from data_pipeline.domains.chat import CHAT_FORMS, DEFAULT_FORM
from data_pipeline.errors import REJECTED, DataError
from data_pipeline.inputs.draft import Input
from data_pipeline.inputs.kinds import describe_kinds, open_inputs, skipped_files
from data_pipeline.media.pixel_budget import MIN_IMAGE_TOKENS, PixelBudget
from data_pipeline.sharding.executors import EXECUTORS, available_cores
from data_pipeline.sharding.job_slice import JobSlice
from data_pipeline.sharding.tasks import BuildOptions, check_chat_form, open_apart
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines
from tools.prompt_check import check_prompt
from tools.shard_preview import print_preview
from tools.shard_report import SHOWN_NAMES, print_counts, print_line, print_outcome, print_unfinished, print_whole

# Commands import what needs torch or draws plots themselves: `build --dry-run` answers in a second.

app = typer.Typer(help=keep_lines(__doc__), no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Shards = Annotated[list[str], typer.Argument(help="folders of shards, .tar files or patterns", metavar="SHARDS...")]
TokenizerFolder = Annotated[str, typer.Option("--tokenizer", help="Hugging Face tokenizer folder; needed for training")]
ChatForm = Annotated[
    str,
    typer.Option(help=f"how chats are written: {', '.join(CHAT_FORMS)}; default: as the tokenizer's models write them"),
]
Workers = Annotated[int, typer.Option(help="processes; 0: one per core", min=0)]
ExecutorName = Annotated[str, typer.Option("--executor", help=f"where the work runs: {', '.join(EXECUTORS)}")]
PartOfWhole = Annotated[str, typer.Option("--part", help="do part I/N, I from 0; the last one to end finishes")]
PartOfArray = Annotated[bool, typer.Option("--array", help="take the part from the SLURM job array that runs this")]

BUILD_HELP = f"""Write shards, their indexes and a manifest from files and folders.

\b
    python -m tools.shard build --input photos/ --dry-run
    python -m tools.shard build --input photos/ --out shards/photos --tokenizer DIR
    python -m tools.shard build --input a.pdf b.pdf --set dpi=150 --out ...
    python -m tools.shard build --input videos/ --kind clips --out ...

Input kinds. They are recognised by file names; those with a star need --kind:

\b
{describe_kinds()}
"""


@app.command(help=BUILD_HELP)
def build(
    out: Annotated[str, typer.Option(help="folder for the shards")] = "",
    input: Annotated[list[str] | None, typer.Option(help="a file or folder; more may follow")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="PATH...", help="inputs, the same as --input")] = None,
    tokenizer: TokenizerFolder = "",
    kind: Annotated[str, typer.Option(help="input kind, where file names do not tell")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="an option of the kind, as option=value (docs/inputs.md); may be repeated"),
    ] = None,
    name: Annotated[
        str, typer.Option(help="shards are called NAME-00000-00000.tar ...; default: the name of the --out folder")
    ] = "",
    shard_bytes: Annotated[str, typer.Option(help="size at which a shard is full, e.g. 500MB or 1GiB")] = "1GiB",
    chat_form: ChatForm = "",
    workers: Workers = 0,
    executor: ExecutorName = "processes",
    part: PartOfWhole = "",
    array: PartOfArray = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what the inputs are taken for, with a sample; write nothing")
    ] = False,
) -> None:
    with errors_in_one_line(DataError):
        inputs = [*(input or []), *(more or [])]
        if not inputs:
            raise DataError("nothing to build from: give files or folders with --input")
        if dry_run:
            _dry_run(inputs, kind, settings or [], chat_form, tokenizer)
            return
        if not out:
            raise DataError("--out is missing: name the folder for the shards, or use --dry-run to write none")
        from data_pipeline.sharding.build import plan, run_build, written_bytes

        options = BuildOptions(out, tokenizer, name or _name_of(out), _bytes(shard_bytes), chat_form, check_prompt)
        job_slice = _job_slice(part, array)
        opened = open_apart(inputs, out, kind, settings or [])
        planned = plan(opened, options, skipped_files(inputs, opened))
        with _progress_of_bytes(planned.bytes, lambda: written_bytes(Path(out))):
            outcome = run_build(
                planned, executor=_executor(executor), workers=_workers(workers, executor), job_slice=job_slice
            )
        print_outcome(outcome, Path(out))
        if outcome.finished and outcome.counts.domains["rl"]:
            _name_unused_verifiers([given for _, given in opened], out)
        if not tokenizer:
            print_line(
                f"tokens are not counted yet; count them with `python -m tools.shard index {out} --tokenizer DIR`"
            )
        if outcome.finished and not outcome.counts.samples:
            raise DataError(f"no sample could be used: see {Path(out) / REJECTED}")


def _name_unused_verifiers(inputs: list[Input], out: str) -> None:
    """Name entries of the option `verifiers` whose data source no prompt has: `verifier` scores what they meant."""
    from data_pipeline.shards.index import read_index
    from tools.shard_prompts import prompts_in, verifiers_of

    if not (entries := verifiers_of(inputs)):
        return
    present = {str(prompt["source"]) for prompt in prompts_in(read_index(path) for path in _shards([out]))}
    if unused := [entry for entry, source in entries.items() if source not in present]:
        sources = ", ".join(map(repr, sorted(present)[:SHOWN_NAMES]))
        print_line(f"warning: no prompt has the data source of --set verifiers={','.join(unused)}; there are {sources}")


def _dry_run(inputs: list[str], kind: str, settings: list[str], chat_form: str, tokenizer: str) -> None:
    from data_pipeline.encoding.generations import choose_chat_form, generation_of

    check_chat_form(chat_form)
    form = choose_chat_form(chat_form, generation_of(Path(tokenizer))) if tokenizer else chat_form or DEFAULT_FORM
    opened = open_inputs(inputs, kind, settings)
    if not print_preview(opened, skipped_files(inputs, opened), form):
        raise DataError("no sample could be made of the first items: see the reasons above")


@app.command()
def index(
    shards: Shards,
    tokenizer: TokenizerFolder = "",
    chat_form: ChatForm = "",
    workers: Workers = 0,
    executor: ExecutorName = "processes",
) -> None:
    """Write the index beside each shard, and the catalogue of each folder."""
    from data_pipeline.sharding.foreign import index_shards

    with errors_in_one_line(DataError):
        paths = _shards(shards)
        with _progress("shards", len(paths)) as tick:
            counts = index_shards(
                paths,
                tokenizer=tokenizer,
                chat_form=chat_form,
                executor=_executor(executor),
                workers=_workers(workers, executor),
                check_prompt=check_prompt,
                tick=tick,
            )
    print_counts(counts)


@app.command()
def verify(
    shards: Shards, tokenizer: TokenizerFolder = "", workers: Workers = 0, executor: ExecutorName = "processes"
) -> None:
    """Read everything back and compare it with manifest and indexes. Exit status 1: something is wrong."""
    from data_pipeline.sharding.verify import jobs_of, verify_shards
    from data_pipeline.sharding.writing import Counts

    total = Counts()
    with errors_in_one_line(DataError):
        jobs, wrong = jobs_of(shards, tokenizer, check_prompt)
        with _progress("shards", len(jobs) + 1) as tick:
            for found in chain(
                [wrong], verify_shards(jobs, executor=_executor(executor), workers=_workers(workers, executor))
            ):
                total.add(found.counts)
                for entry in found.rejected:
                    print_line(f"{entry.origin}: {entry.reason}: {entry.detail}")
                tick()
    print_counts(total, see="")
    if total.rejected:
        raise typer.Exit(1)


@app.command()
def stats(
    shards: Shards,
    image_max_tokens: Annotated[
        int, typer.Option(min=MIN_IMAGE_TOKENS, help="pixel budget of an image, in tokens")
    ] = PixelBudget.image_max_tokens,
    video_max_tokens: Annotated[
        int, typer.Option(min=MIN_IMAGE_TOKENS, help="pixel budget of a video, in tokens")
    ] = PixelBudget.video_max_tokens,
    plot: Annotated[Path | None, typer.Option(help="draw lengths, sizes and durations, e.g. stats.png")] = None,
) -> None:
    """Count samples, images, videos and tokens by domain, from the indexes alone, and draw distributions."""
    from data_pipeline.shards.index import read_index
    from tools.shard_prompts import prompts_in, repeated, table_of_prompts
    from tools.shard_stats import collect, draw, table_of

    with errors_in_one_line(DataError):
        indexes = [read_index(path) for path in _shards(shards)]
        found = collect(indexes, PixelBudget(image_max_tokens, video_max_tokens))
        if not found:
            raise DataError(f"no sample is indexed in {', '.join(shards)}: see {REJECTED} beside the shards")
        prompts = prompts_in(indexes) if "rl" in found else []
        if plot:
            draw(found, plot)
    print_whole(table_of(found))
    if prompts:
        print_whole(table_of_prompts(prompts))
        if again := repeated(prompts):
            print_line(f"{again:,} prompts ask the same as an earlier one, with the same images and videos")
    if plot:
        print_line(f"plot: {plot}")


@app.command()
def curate(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="folder for the kept shards and the report")],
    recipe: Annotated[Path, typer.Option(help="YAML list of filters, see docs/curation.md")],
    tokenizer: TokenizerFolder = "",
    workers: Workers = 0,
    executor: ExecutorName = "processes",
    part: PartOfWhole = "",
    array: PartOfArray = False,
) -> None:
    """Keep the samples that pass a list of filters, and recaption them if the recipe says so."""
    from data_pipeline.curation.recipe import read_recipe
    from data_pipeline.curation.report import funnel_table
    from data_pipeline.curation.run import Unfinished
    from data_pipeline.curation.run import curate as run_curation

    with errors_in_one_line(DataError):
        found = run_curation(
            _shards(shards),
            out,
            read_recipe(recipe),
            tokenizer=tokenizer,
            executor=_executor(executor),
            workers=_workers(workers, executor),
            job_slice=_job_slice(part, array),
            progress=_progress,
            progress_of_bytes=_progress_of_bytes,
        )
    if isinstance(found, Unfinished):
        print_unfinished(found)
        return
    print_whole(funnel_table(found))
    print_line(f"{out}: filtered.jsonl lists each filtered sample with its reason, funnel.png shows how many")


def _shards(given: list[str]) -> list[Path]:
    from tools.shard_paths import shards_of

    return shards_of(given, print_line)


def _executor(name: str) -> str:
    if name not in EXECUTORS:
        raise DataError(f"--executor {name} is unknown: use {', '.join(EXECUTORS)}")
    return name


def _workers(given: int, executor: str) -> int:
    if executor == "here" and given > 1:
        raise DataError(f"--workers {given} has no effect with --executor here, which is one process: use processes")
    return given or available_cores()


def _bytes(size: str) -> int:
    try:
        return parse_size(size)
    except ValueError as error:
        raise DataError(f"--shard-bytes {error}") from None


def _name_of(out: str) -> str:
    """Return the name of shards in a folder: the folder's, so that two folders have no shards of the same name."""
    return re.sub(r"[^\w.-]+", "-", Path(out).resolve().name).strip(".-") or "shard"


def _job_slice(given: str, array: bool) -> JobSlice | None:
    """Return the slice that --part names, or that belongs to this job of a SLURM array. None: everything."""
    if given and array:
        raise DataError("--part and --array both say which part to do: give one of them")
    if given:
        found = re.fullmatch(r"(\d+)/(\d+)", given)
        if not found:
            raise DataError(f"--part {given}: write I/N, from 0/N to (N-1)/N")
        return JobSlice(int(found[1]), int(found[2]))
    return _slice_of_array() if array else None


def _slice_of_array() -> JobSlice:
    try:
        own, first, last, count = (
            int(os.environ[f"SLURM_ARRAY_TASK_{word}"]) for word in ("ID", "MIN", "MAX", "COUNT")
        )
    except (KeyError, ValueError) as error:
        raise DataError(
            f"--array: this is not a job of a SLURM array ({error} is not set): use sbatch --array=0-7"
        ) from error
    if last - first + 1 != count:
        raise DataError(
            "--array: the array's numbers have gaps, so some parts would never be done: give numbers without gaps, "
            "or do what is left with the same command without --array"
        )
    return JobSlice(own - first, count)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _progress_of_bytes(total: int, written: Callable[[], int]) -> Iterator[None]:
    """Show a progress bar that is updated every second with the bytes that all processes have written."""
    columns = (TextColumn("written"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    ended = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("written", total=total)

        def look() -> None:
            while not ended.wait(1):
                progress.update(task, completed=min(written(), total))

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


if __name__ == "__main__":
    run(app)
