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

import typer

from planning.limits import Limits
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

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
    find: Annotated[
        bool, typer.Option("--search", help="look for the fastest layouts that fit, instead of the run's own")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="folder of a measured run, whose step time corrects the predicted one")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write the plan as a page, one file")] = None,
    gpu_memory: Annotated[float, typer.Option(help="GiB of a GPU")] = Limits.gpu_memory,
    context: Annotated[float, typer.Option(help="GiB of CUDA and the driver")] = Limits.context,
    nccl: Annotated[float, typer.Option(help="GiB of NCCL's buffers")] = Limits.nccl,
    workspaces: Annotated[float, typer.Option(help="GiB of matrix products and attention")] = Limits.workspaces,
    fragmentation: Annotated[float, typer.Option(help="share of all tensors")] = Limits.fragmentation,
    imbalance: Annotated[
        float, typer.Option(help="tokens that the busiest expert rank receives, over an even share")
    ] = Limits.imbalance,
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: nothing is computed, a login node's GPU is not touched
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the fake process group

    from planning.plan import read_workload
    from planning.step_time import Rates
    from rl.config import RlConfig
    from tools.plan_answer import calibrated_rates, print_layouts, print_plan
    from tools.plan_rollouts import read_rl_workload
    from tools.run_config import load_run
    from training.errors import EXPECTED_ERRORS

    with errors_in_one_line(*EXPECTED_ERRORS):
        limits = Limits(gpu_memory, context, nccl, workspaces, fragmentation, imbalance)
        config_of_run = load_run(config, overrides or ())
        if isinstance(config_of_run, RlConfig):
            workload = read_rl_workload(config_of_run, world_size, skip_files)
        else:
            workload = read_workload(config_of_run, world_size, skip_files)
        rates = calibrated_rates(calibrate, skip_files) if calibrate else Rates()
        if find:
            print_layouts(workload, world_size, limits, rates)
            return
        fits = print_plan(workload, world_size, limits, rates, all_ranks=all_ranks, out=out)
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)


if __name__ == "__main__":
    run(app)
