"""Data to shards, and what is in them.

    python -m tools.shard build  --input records.jsonl --out DIR --tokenizer DIR
    python -m tools.shard index  DIR_OR_TAR... --tokenizer DIR      for shards that someone else wrote
    python -m tools.shard verify DIR_OR_TAR...                      checksums, and every image and clip decoded
    python -m tools.shard stats  DIR_OR_TAR...
    python -m tools.shard curate DIR_OR_TAR... --out DIR --recipe curation.yaml      filters, duplicates, recaptions

A line of records.jsonl is {"domain": NAME, ..., "images": [paths], "videos": [paths]}, see data_pipeline.domains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipeline.build import MAX_SHARD_BYTES, REJECTED, Report, build_shards, index_shards, verify_shard
from data_pipeline.curation.recipe import read_recipe
from data_pipeline.curation.report import funnel_table
from data_pipeline.curation.run import curate as run_curation
from data_pipeline.domains.chat import CHAT_FORMS, DEFAULT_FORM
from data_pipeline.encode import PixelBudget
from data_pipeline.errors import DataError
from data_pipeline.index import find_shards, read_index, sample_lengths
from data_pipeline.sharding.executors import EXECUTORS, available_cores
from data_pipeline.tokens import GlmTokenizer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()

Shards = Annotated[list[str], typer.Argument(help="folders of shards, .tar files or patterns", metavar="SHARDS...")]
TokenizerFolder = Annotated[
    Path | None, typer.Option("--tokenizer", help="Hugging Face tokenizer folder; needed for training")
]
ChatForm = Annotated[str, typer.Option(help=f"how chats are written: {' or '.join(CHAT_FORMS)}")]


@app.command()
def build(
    input: Annotated[Path, typer.Option(help="JSON lines: a record and its files a line")],
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    tokenizer: TokenizerFolder = None,
    name: Annotated[str, typer.Option(help="shards are called NAME-00000.tar ...")] = "shard",
    max_shard_bytes: Annotated[int, typer.Option(help="a new shard begins after this many bytes")] = MAX_SHARD_BYTES,
    chat_form: ChatForm = DEFAULT_FORM,
) -> None:
    """Writes shards and their indexes from a JSON-lines file."""
    with _errors(), _progress("records", _count_lines(input)) as tick:
        report = build_shards(
            input,
            out,
            tokenizer=_tokenizer(tokenizer),
            name=name,
            max_shard_bytes=max_shard_bytes,
            chat_form=_chat_form(chat_form),
            tick=tick,
        )
    _print_report(report)


@app.command()
def index(shards: Shards, tokenizer: TokenizerFolder = None, chat_form: ChatForm = DEFAULT_FORM) -> None:
    """Writes the index beside each shard."""
    with _errors():
        paths = _shards(shards)
        with _progress("shards", len(paths)) as tick:
            report = index_shards(paths, tokenizer=_tokenizer(tokenizer), chat_form=_chat_form(chat_form), tick=tick)
    _print_report(report)


@app.command()
def verify(shards: Shards, tokenizer: TokenizerFolder = None) -> None:
    """Reads everything back; exits with 1 if a sample cannot be used."""
    with _errors():
        indexes = [read_index(path) for path in _shards(shards)]
        glm_tokenizer = _tokenizer(tokenizer)
        total = Report()
        with _progress("samples", sum(shard.table.num_rows for shard in indexes)) as tick:
            for shard in indexes:
                report = verify_shard(shard, glm_tokenizer, tick)
                total.samples += report.samples
                total.rejected += report.rejected
                total.shards += report.shards
    for entry in total.rejected:
        console.print(f"{entry['shard']}/{entry['key']}: {entry['reason']}: {entry['detail']}", markup=False)
    _print_report(total)
    if total.rejected:
        raise typer.Exit(1)


@app.command()
def stats(
    shards: Shards,
    image_max_tokens: Annotated[int, typer.Option(help="pixel budget of a picture")] = 6144,
    video_max_tokens: Annotated[int, typer.Option(help="pixel budget of a clip")] = 30000,
) -> None:
    """Counts samples, images, clips and tokens by domain."""
    counts: dict[str, Counter[str]] = {}
    with _errors():
        for path in _shards(shards):
            shard = read_index(path)
            lengths = sample_lengths(shard.table, PixelBudget(image_max_tokens, video_max_tokens)).tolist()
            columns = shard.table.select(["domain", "text_tokens", "images", "videos", "members"]).to_pylist()
            for row, length in zip(columns, lengths, strict=True):
                count = counts.setdefault(row["domain"], Counter())
                count["samples"] += 1
                count["images"] += len(row["images"])
                count["clips"] += len(row["videos"])
                count["tokens"] += length
                count["text tokens"] += row["text_tokens"]
                count["bytes"] += sum(member["size"] for member in row["members"])
                count["longest"] = max(count["longest"], length)
    columns_shown = ("samples", "images", "clips", "tokens", "text tokens", "longest", "bytes")
    table = Table("domain", *columns_shown)
    for domain, count in sorted(counts.items()):
        table.add_row(domain, *(f"{count[column]:,}" for column in columns_shown))
    console.print(table)


@app.command()
def curate(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="folder for the shards that stay, and the account of the others")],
    recipe: Annotated[Path, typer.Option(help="YAML list of filters, see data_pipeline/curation/recipe.py")],
    tokenizer: TokenizerFolder = None,
    executor: Annotated[str, typer.Option(help=f"where the work is done: {', '.join(EXECUTORS)}")] = "processes",
    workers: Annotated[int, typer.Option(help="processes; 0: as many as there are cores")] = 0,
) -> None:
    """Keeps the samples that pass a list of filters."""
    with _errors():
        funnel = run_curation(
            _shards(shards),
            out,
            read_recipe(recipe),
            tokenizer=str(tokenizer or ""),
            executor=executor,
            workers=workers or available_cores(),
            progress=_progress,
        )
    console.print(funnel_table(funnel))
    console.print(f"{out}: shards of {funnel.kept.total():,} samples, dropped.jsonl, funnel.png", soft_wrap=True)


def _shards(given: list[str]) -> list[Path]:
    return [shard for path in given for shard in find_shards(path)]


def _tokenizer(folder: Path | None) -> GlmTokenizer | None:
    return GlmTokenizer(folder) if folder else None


def _chat_form(form: str) -> str:
    if form not in CHAT_FORMS:
        raise DataError(f"--chat-form {form} is unknown: use {' or '.join(CHAT_FORMS)}")
    return form


def _count_lines(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give a JSON-lines file")
    with open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)


def _print_report(report: Report) -> None:
    table = Table("domain", "samples")
    for domain, count in sorted(report.samples.items()):
        table.add_row(domain, f"{count:,}")
    console.print(table)
    console.print(f"shards: {len(report.shards)}, samples: {sum(report.samples.values()):,}")
    if report.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons().most_common())
        console.print(f"rejected: {len(report.rejected)} ({reasons}), see {REJECTED}", markup=False, soft_wrap=True)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _errors() -> Iterator[None]:
    """A mistake in the data or the call is one line on stderr and exit status 2."""
    try:
        yield
    except (DataError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        typer.echo(f"error: {said}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
