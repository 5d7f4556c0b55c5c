"""Write a page that shows what is in a shard or a batch.

    python -m tools.view shards SHARDS... --tokenizer DIR --out page.html
    python -m tools.view batch --config RUN.yaml --out packs.html [KEY=VALUE]...

The page is one file without scripts or external links. Images are drawn from the patches that the model gets, with
the boxes that the text names. Every token shows whether it carries loss, its id and its position.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track

from data_pipeline.errors import DataError
from data_pipeline.media.pixel_budget import MIN_IMAGE_TOKENS, PixelBudget
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

if TYPE_CHECKING:  # it needs torch
    from tools.view_content import PackView

app = typer.Typer(help=keep_lines(__doc__), no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()

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
    from data_pipeline.encoding.tokenizer import GlmTokenizer
    from data_pipeline.shards.index import read_index
    from tools.shard_paths import shards_of
    from tools.view_content import PackView
    from tools.view_samples import spread, views_of, with_keys

    with errors_in_one_line(DataError):
        glm_tokenizer = GlmTokenizer(tokenizer)
        paths = shards_of(shards, lambda empty: console.print(empty, markup=False, soft_wrap=True))
        indexes = [read_index(path) for path in paths]
        budget = PixelBudget(image_max_tokens, video_max_tokens)
        chosen = with_keys(indexes, key) if key else spread(indexes, samples)
        views = views_of(track(chosen, "samples", console=Console(stderr=True), transient=True), glm_tokenizer, budget)
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
    from tools.run_config import refuse_rl
    from tools.view_content import view_of_pack
    from training.config import RunConfig, load_config
    from training.errors import EXPECTED_ERRORS
    from training.setup import build_loader
    from training.start_point import find_start_point, resolve_model

    with errors_in_one_line(*EXPECTED_ERRORS):
        why = "its packs are made of rollouts; `tools.view shards` shows prompts, and `tools.report RUN` shows rollouts"
        refuse_rl(config, overrides or (), why)
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


def _write(out: Path, title: str, packs: list[PackView], open_page: bool) -> None:
    from tools.view_page import write_page

    size = write_page(out, title, packs)
    console.print(f"{out}: {title}, {size / 1e6:.1f} MB", markup=False, highlight=False, soft_wrap=True)
    if open_page:
        webbrowser.open(out.resolve().as_uri())


if __name__ == "__main__":
    run(app)
