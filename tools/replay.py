"""Run the packs of one step of a run again, each alone: which sample made the step bad?

    python -m tools.replay RUN STEP [--checkpoint DIR] [--html page.html] [--json replay.json] [KEY=VALUE]...
    torchrun --nproc_per_node N -m tools.replay RUN STEP ...         in the run's layout, where one process is too small

The weights are those of the run's newest checkpoint before STEP. Shown are, of every pack, the loss and the norm of the
gradient as if it were the whole step; of every sample, its mean loss and the token with the largest one. Nothing is
written into RUN.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.files import write_json
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

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
    from tools.replay_output import lines_of, views_of
    from tools.run_config import refuse_rl
    from tools.view_page import write_page
    from training.errors import expected_errors
    from training.metrics import finite_content
    from training.ranks import rank
    from training.replay import prepare_replay, replay
    from training.start_point import RUN_CONFIG

    with errors_in_one_line():
        with expected_errors(on_every_process=False):
            if (run / RUN_CONFIG).is_file():
                why = "its packs are made of rollouts, which are in rollouts/ of the run; `tools.report RUN` shows them"
                refuse_rl(run / RUN_CONFIG, (), why)
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


if __name__ == "__main__":
    run(app)
