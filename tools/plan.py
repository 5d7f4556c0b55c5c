"""Plan a run before a GPU is there: will it fit, what does each rank hold and send, what would make it fit.

    python -m tools.plan --config configs/glm45v/pretrain.yaml --world-size 256 [dotted.key=value ...]
    python -m tools.plan --config configs/glm45v/pretrain.yaml --world-size 256 --search

The model of the fullest rank of every pipeline stage is built on this machine without memory for values, with its
optimizer, and takes a step on the fullest of the run's first packs. The kernels are those of Transformer Engine, as far
as what they keep is known (docs/planning.md). No process group, device or file is touched. Not run on a GPU.

The exit status is 0 if the run fits, 3 if it does not, and 2 after an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: nothing is computed, and a login node's GPU is not touched

import typer

from planning.limits import Limits
from planning.plan import make_plan, read_workload, smallest_world, what_would_fit
from tools.errors import errors_in_one_line
from tools.help_text import keep_lines
from tools.plan_table import plan_text
from training.config import RunConfig, load_config
from training.errors import EXPECTED_ERRORS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
DOES_NOT_FIT = 3  # exit status


@app.command(help=keep_lines(__doc__))
def main(
    config: Annotated[list[Path], typer.Option(help="the run's YAML file; may be repeated: later ones win")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="keys that replace those of the files", metavar="dotted.key=value")
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="number of GPUs")] = 8,
    skip_files: Annotated[
        bool, typer.Option("--skip-files", help="open no data, tokenizer or model.init_from: assume packs")
    ] = False,
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="build every rank: minutes")] = False,
    gpu_memory: Annotated[float, typer.Option(help="GiB of a GPU")] = Limits.gpu_memory,
    context: Annotated[float, typer.Option(help="GiB of CUDA and the driver")] = Limits.context,
    nccl: Annotated[float, typer.Option(help="GiB of NCCL's buffers")] = Limits.nccl,
    workspaces: Annotated[float, typer.Option(help="GiB of matrix products and attention")] = Limits.workspaces,
    fragmentation: Annotated[float, typer.Option(help="share of all tensors")] = Limits.fragmentation,
    imbalance: Annotated[
        float, typer.Option(help="tokens that the busiest expert rank receives, over an even share")
    ] = Limits.imbalance,
) -> None:
    with errors_in_one_line(*EXPECTED_ERRORS):
        limits = Limits(gpu_memory, context, nccl, workspaces, fragmentation, imbalance)
        run = load_config(RunConfig, config, overrides or ())
        workload = read_workload(run, world_size, skip_files)
        plan = make_plan(workload, world_size, limits, all_ranks=all_ranks)
        changes = [] if plan.fits else list(what_would_fit(plan))
        print(plan_text(plan, smallest_world(plan), changes))
    if not plan.fits:
        raise typer.Exit(DOES_NOT_FIT)


if __name__ == "__main__":
    app()
