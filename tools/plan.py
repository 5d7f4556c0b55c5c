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
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the fake process group

import typer

from common.files import write_text
from model.config import ConfigError
from planning.limits import Limits
from planning.parameters import distinct_parameters
from planning.plan import make_plan, read_workload, smallest_world, traced_of, what_would_fit
from planning.search import search
from planning.step_time import Rates, calibrated, step_time
from tools.errors import errors_in_one_line
from tools.help_text import keep_lines
from tools.plan_page import plan_page
from tools.plan_table import plan_text, search_text
from tools.report_runs import read_runs
from training.config import RunConfig, load_config
from training.errors import EXPECTED_ERRORS
from training.start_point import RUN_CONFIG

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
    with errors_in_one_line(*EXPECTED_ERRORS):
        limits = Limits(gpu_memory, context, nccl, workspaces, fragmentation, imbalance)
        run = load_config(RunConfig, config, overrides or ())
        workload = read_workload(run, world_size, skip_files)
        rates = _calibrated(calibrate, skip_files) if calibrate else Rates()
        if find:
            print(search_text(search(workload, world_size, limits, rates), world_size))
            return
        plan = make_plan(workload, world_size, limits)
        changes = [] if plan.fits else list(what_would_fit(plan))
        predicted = step_time(run, workload.model, plan.layout, workload.typical, world_size, rates)
        print(plan_text(plan, predicted, smallest_world(plan), changes))
        if all_ranks:
            traced, _ = traced_of(workload, world_size, limits)
            total = sum(distinct_parameters(traced, rank) for rank in range(world_size))
            print(f"all {world_size} ranks were built; their parameters, each counted once: {total:,}")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, plan_page(plan, predicted))
            print(f"wrote {out}")
    if not plan.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _calibrated(run: Path, skip_files: bool) -> Rates:
    """Return the rates with which a measured run's step time is predicted as it was measured."""
    [record] = read_runs([run])
    config = load_config(RunConfig, run / RUN_CONFIG)
    if not record.starts:
        raise ConfigError(f"--calibrate {run}: its log.txt does not say on how many processes it ran")
    processes = record.starts[-1].processes
    workload = read_workload(config, processes, skip_files)
    _, layout = traced_of(workload, processes, Limits())
    predicted = step_time(config, workload.model, layout, workload.typical, processes, Rates())
    return calibrated(Rates(), record.values("step_seconds"), predicted, str(run))


if __name__ == "__main__":
    app()
