"""Write a page that shows what is in a shard or a batch.

    python -m tools.view shards SHARDS... --tokenizer DIR --out page.html
    python -m tools.view batch --config RUN.yaml --out packs.html [KEY=VALUE]...

The page is one file without scripts or external links. Images are drawn from the patches that the model gets, with
the boxes that the text names. Every token shows whether it carries loss, its id and its position.
"""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from data_pipeline.encoding.encode import encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.pixel_budget import MIN_IMAGE_TOKENS, PixelBudget
from data_pipeline.shards.index import ShardIndex, read_index
from data_pipeline.shards.reader import ShardReader
from model.checkpoint import CheckpointError
from model.config import ConfigError
from model.safetensors_folder import WeightsError
from tools.errors import errors_in_one_line
from tools.help_text import keep_lines
from tools.shard_paths import shards_of
from tools.view_content import PackView, SequenceView, view_of_failure, view_of_pack, view_of_sample
from tools.view_page import write_page
from training.config import RunConfig, load_config
from training.setup import build_loader
from training.start_point import find_start_point, resolve_model

app = typer.Typer(help=keep_lines(__doc__), no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()
_T = TypeVar("_T")

Out = Annotated[Path, typer.Option(help="the page to write")]
Open = Annotated[bool, typer.Option("--open", help="show it in a browser")]


@app.command()
def shards(
    shards: Annotated[list[str], typer.Argument(help="folders of shards, .tar files or patterns", metavar="SHARDS...")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder")],
    out: Out = Path("view.html"),
    samples: Annotated[int, typer.Option(min=1, help="number of samples, spread evenly over the shards")] = 24,
    key: Annotated[list[str] | None, typer.Option(help="show this sample; may be repeated")] = None,
    image_max_tokens: Annotated[
        int, typer.Option(min=MIN_IMAGE_TOKENS, help="pixel budget of an image, in tokens")
    ] = PixelBudget.image_max_tokens,
    video_max_tokens: Annotated[
        int, typer.Option(min=MIN_IMAGE_TOKENS, help="pixel budget of a video, in tokens")
    ] = PixelBudget.video_max_tokens,
    open_page: Open = False,
) -> None:
    """Show samples: images with boxes, frames with their seconds, the record, tokens and which of them carry loss."""
    with errors_in_one_line(CheckpointError, ConfigError, DataError, WeightsError):
        glm_tokenizer = GlmTokenizer(tokenizer)
        paths = shards_of(shards, lambda empty: console.print(empty, markup=False, soft_wrap=True))
        indexes = [read_index(path) for path in paths]
        budget = PixelBudget(image_max_tokens, video_max_tokens)
        chosen = _with_keys(indexes, key) if key else _spread(indexes, samples)
        reader = ShardReader()
        views = [
            _view(reader, shard, row, glm_tokenizer, budget)
            for shard, row in track(chosen, "samples", console=Console(stderr=True), transient=True)
        ]
        reader.close()
        total = sum(shard.table.num_rows for shard in indexes)
        title = f"{len(views):,} of {total:,} samples in {len(indexes):,} shards"
        _write(out, title, [PackView(sequences=views)], open_page)


@app.command()
def batch(
    config: Annotated[Path, typer.Option(help="the YAML of a run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value ...", metavar="[KEY=VALUE]...")
    ] = None,
    out: Out = Path("view.html"),
    step: Annotated[int, typer.Option(min=1, help="the first step to show")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="number of steps")] = 1,
    open_page: Open = False,
) -> None:
    """Show the packs of a run's steps: segments, positions, and the samples in them."""
    with errors_in_one_line(CheckpointError, ConfigError, DataError, WeightsError):
        # A run in train.output_dir may be another one; nothing of it is shown.
        run = load_config(
            RunConfig, config, [*(overrides or []), "data.num_workers=0", "checkpoint.allow_changes=true"]
        )
        loader = build_loader(run, resolve_model(run.model, find_start_point(run)))
        loader.skip(step - 1)
        packs: list[PackView] = []
        last = step - 1
        for number in track(range(step, step + steps), "steps", console=Console(stderr=True), transient=True):
            if not (batches := loader.next_step()):  # the data has ended
                break
            last = number
            packs += [
                view_of_pack(batch, loader.tokenizer, f"step {number}, pack {index}")
                for index, batch in enumerate(batches)
            ]
        loader.close()
        if not packs:
            raise DataError(f"the data ends before step {step}: give a smaller --step, or more epochs")
        _write(out, f"steps {step} to {last} of {config}", packs, open_page)


def _spread(indexes: Sequence[ShardIndex], samples: int) -> list[tuple[ShardIndex, int]]:
    """Choose samples at equal distances: the same number from every shard, or all of a shard that has fewer.

    If there are more shards than samples, choose samples at equal distances through all shards.
    """
    rows = [[(shard, row) for row in range(shard.table.num_rows)] for shard in indexes]
    if samples < len(rows):
        return _evenly(list(chain.from_iterable(rows)), samples)
    shares = dict.fromkeys(range(len(rows)), 0)
    left = samples
    for done, shard in enumerate(sorted(shares, key=lambda shard: len(rows[shard]))):
        shares[shard] = min(len(rows[shard]), left // (len(rows) - done))
        left -= shares[shard]
    return [chosen for shard, share in shares.items() for chosen in _evenly(rows[shard], share)]


def _evenly(rows: Sequence[_T], count: int) -> list[_T]:
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _with_keys(indexes: Sequence[ShardIndex], keys: Sequence[str]) -> list[tuple[ShardIndex, int]]:
    chosen: list[tuple[ShardIndex, int]] = []
    missing = set(keys)
    for shard in indexes:
        for row, key in enumerate(shard.table.column("key").to_pylist()):
            if found := {key, f"{shard.file.name}/{key}"}.intersection(keys):
                chosen.append((shard, row))
                missing -= found
    if missing:
        raise DataError(
            f"--key: no sample is called {' or '.join(sorted(missing))}: give KEY or SHARD.tar/KEY as a run's logs do"
        )
    return chosen


def _view(
    reader: ShardReader, shard: ShardIndex, row: int, tokenizer: GlmTokenizer, budget: PixelBudget
) -> SequenceView:
    stored = shard.sample(row)
    name = f"{shard.file.name}/{stored.key}"
    try:
        raw = reader.read(str(shard.file), stored)
        encoded = encode_record(
            raw.record,
            raw.images,
            raw.videos,
            tokenizer=tokenizer,
            budget=budget,
            sample_id=name,
            chat_form=shard.header.chat_form,
        )
    except BadSample as error:
        return view_of_failure(name, error)
    return view_of_sample(encoded, tokenizer, raw.record)


def _write(out: Path, title: str, packs: list[PackView], open_page: bool) -> None:
    size = write_page(out, title, packs)
    console.print(f"{out}: {title}, {size / 1e6:.1f} MB", markup=False, highlight=False, soft_wrap=True)
    if open_page:
        webbrowser.open(out.resolve().as_uri())


if __name__ == "__main__":
    app()
