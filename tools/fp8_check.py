"""Is FP8 near enough? Train with and without it, from the same weights on the same packs, and compare.

    python -m tools.fp8_check --config FILE [fp8.recipe=blockwise] [key=value ...] [--steps 10] [--json distance.json]
    torchrun --nproc_per_node N -m tools.fp8_check --config FILE ...           in the layout of the run

Without Transformer Engine, FP8 is emulated, and the first line says so. Nothing is written but the JSON file; the run's
own folder is not touched. The weights are those that model.init_from names, or random ones. The exit code is 1 if a
distance is above its limit:

    loss        mean of the relative differences of all steps: 0.25%, which DeepSeek-V3 reports for its FP8 training
                (arXiv 2412.19437, section 3.3)
    gradient    relative difference by norm of the whole gradient in the first step: twice what the rounding of one
                layer's operands explains
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from common.files import write_json
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

MAX_LOSS = 0.0025  # mean relative difference; DeepSeek-V3, arXiv 2412.19437, section 3.3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=keep_lines(__doc__))
def main(
    config: Annotated[list[Path], typer.Option(help="the run's YAML file; may be repeated: later ones win")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="keys that replace those of the files", metavar="[KEY=VALUE]...")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps of either training")] = 10,
    sft: Annotated[bool, typer.Option("--sft", help="the configuration is one of sft.train")] = False,
    max_loss: Annotated[
        float, typer.Option(min=0, help="limit of the mean relative difference of the loss")
    ] = MAX_LOSS,
    max_gradient: Annotated[
        float | None, typer.Option(min=0, help="limit of the gradient's relative difference; default: by the recipe")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write the numbers as JSON")] = None,
) -> None:
    from sft.train import SftConfig
    from tools.fp8_verdict import Limits, as_json, gradient_limit, report
    from tools.hf_output import progress_bar
    from tools.run_config import refuse_rl
    from training.config import RunConfig, load_config
    from training.distributed import process_group
    from training.errors import expected_errors
    from training.fp8_distance import compare, prepare_pair
    from training.ranks import rank

    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="glmv-fp8-") as scratch:
        with expected_errors(on_every_process=False):
            why = "its packs are made of rollouts; compare on the data of the stage before, with its configuration"
            refuse_rl(config, overrides or (), why)
            run = load_config(SftConfig if sft else RunConfig, config, overrides or ())
            pair = prepare_pair(run, Path(scratch) / "run")
        limits = Limits(max_loss, gradient_limit(run.fp8) if max_gradient is None else max_gradient)
        with expected_errors(on_every_process=True), process_group(run.health.collective_timeout):
            with progress_bar("training", 2 * steps) as progress:
                distance = compare(*pair, steps, lambda: progress.advance(progress.task_ids[0]))
            if rank() == 0:
                report(distance, limits)
                if json is not None:
                    json.parent.mkdir(parents=True, exist_ok=True)
                    write_json(json, as_json(distance, limits))
        if not limits.are_kept(distance):
            raise typer.Exit(1)


if __name__ == "__main__":
    run(app)
