"""Run the packs of one step of a run again, each alone: which sample made the step bad?

    python -m tools.replay RUN STEP [--checkpoint DIR] [--html page.html] [--json replay.json] [KEY=VALUE]...
    torchrun --nproc_per_node N -m tools.replay RUN STEP ...         in the run's layout, where one process is too small

The weights are those of the run's newest checkpoint before STEP. Shown are, of every pack, the loss and the norm of the
gradient as if it were the whole step; of every sample, its mean loss and the token with the largest one. Nothing is
written into RUN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from common.files import write_json
from data_pipeline.encoding.batch import Batch
from data_pipeline.encoding.tokenizer import GlmTokenizer
from tools.errors import errors_in_one_line
from tools.help_text import keep_lines
from tools.view_content import PackView, view_of_pack
from tools.view_page import shown_text, write_page
from training.distributed import rank
from training.errors import expected_errors
from training.metrics import finite_content
from training.replay import Replay, SampleLoss, prepare_replay, replay

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=keep_lines(__doc__))
def main(
    run: Annotated[Path, typer.Argument(help="the run's folder", metavar="RUN")],
    step: Annotated[int, typer.Argument(help="the step, from 1", min=1, metavar="STEP")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="keys of the run to change, such as its layout", metavar="[KEY=VALUE]...")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="other weights: a step folder, a run's folder or a Hugging Face folder")
    ] = None,
    pack: Annotated[list[int] | None, typer.Option(help="run this pack only; may be repeated")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page that shows the packs")] = None,
    json: Annotated[Path | None, typer.Option(help="write the numbers as JSON")] = None,
) -> None:
    with errors_in_one_line():
        with expected_errors(on_every_process=False):
            prelude = prepare_replay(run, step, checkpoint, overrides or ())
        with expected_errors(on_every_process=True):
            replayed, batches = replay(prelude, step, pack or ())
        if rank() == 0:
            for line in lines_of(replayed, prelude.prepared.config.train.seq_length):
                typer.echo(line)
            if json is not None:
                json.parent.mkdir(parents=True, exist_ok=True)
                write_json(json, finite_content(asdict(replayed)))
            if html is not None:
                views = views_of(replayed, batches, prelude.prepared.loader.tokenizer)
                write_page(html, f"step {step} of {run}", views)
                typer.echo(f"{html}: the packs as a page")


def lines_of(replayed: Replay, seq_length: int) -> Iterator[str]:
    """Yield what the terminal shows."""
    yield f"step {replayed.step}, with {replayed.weights}"
    if replayed.steps_between:
        yield f"these weights are {replayed.steps_between} steps older than the step"
    for pack in replayed.packs:
        yield ""
        yield (
            f"pack {pack.pack}: loss {_number(pack.loss)}, gradient norm {_number(pack.grad_norm)}, {pack.tokens:,} of "
            f"{seq_length:,} tokens, {pack.loss_tokens:,} with loss"
        )
        yield "      loss  max loss  tokens  sample"
        yield from (_line(sample) for sample in pack.samples)
    yield ""
    yield f"mean loss {_number(replayed.loss)} over {sum(pack.loss_tokens for pack in replayed.packs):,} tokens"


def _line(sample: SampleLoss) -> str:
    at = "" if sample.max_token is None else f"  {shown_text(repr(sample.max_text))} at token {sample.max_token}"
    numbers = f"{_number(sample.loss):>10}{_number(sample.max_loss):>10}{sample.tokens:>8,}"
    return f"{numbers}  {sample.source}: {sample.shard}/{sample.key}{at}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def views_of(replayed: Replay, batches: list[Batch], tokenizer: GlmTokenizer) -> list[PackView]:
    """Return the packs as tools.view shows them, with their losses."""
    views = []
    for pack, batch in zip(replayed.packs, batches, strict=True):
        view = view_of_pack(batch, tokenizer, f"step {replayed.step}, pack {pack.pack}")
        facts = {"loss": _number(pack.loss), "gradient norm": _number(pack.grad_norm), **view.facts}
        sequences = [
            replace(sequence, facts={**_facts(sample), **sequence.facts})
            for sequence, sample in zip(view.sequences, pack.samples, strict=True)
        ]
        views.append(replace(view, facts=facts, sequences=sequences))
    return views


def _facts(sample: SampleLoss) -> dict[str, str]:
    if sample.loss is None:
        return {"source": sample.source}
    highest = f"{_number(sample.max_loss)} of {sample.max_text!r} at token {sample.max_token}"
    return {"source": sample.source, "loss": _number(sample.loss), "highest": highest}


if __name__ == "__main__":
    app()
