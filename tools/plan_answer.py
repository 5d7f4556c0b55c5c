"""What tools.plan answers: the plan of a run, or the fastest layouts that fit."""

from __future__ import annotations

from pathlib import Path

from common.files import write_text
from model.config import ConfigError
from planning.alternatives import smallest_world, what_would_fit
from planning.limits import Limits
from planning.parameters import distinct_parameters
from planning.plan import Workload, make_plan, read_workload, traced_of
from planning.search import search
from planning.step_time import Rates, calibrated, step_time
from tools.plan_page import plan_page
from tools.plan_table import plan_text, search_text
from tools.report_runs import read_runs
from tools.run_config import refuse_rl
from training.config import RunConfig, load_config
from training.start_point import RUN_CONFIG


def print_layouts(workload: Workload, world_size: int, limits: Limits, rates: Rates) -> None:
    """Search the layouts of a run, and print the fastest ones that fit."""
    print(search_text(search(workload, world_size, limits, rates), world_size))


def print_plan(
    workload: Workload, world_size: int, limits: Limits, rates: Rates, *, all_ranks: bool, out: Path | None
) -> bool:
    """Plan a run, print the plan, and return whether the run fits.

    Args:
        workload: The run.
        world_size: Number of GPUs.
        limits: What a GPU has, and what of it tensors do not get.
        rates: What the step time is predicted with.
        all_ranks: Build every rank, and count their parameters.
        out: Page to write; None: none.
    """
    plan = make_plan(workload, world_size, limits)
    changes = [] if plan.fits else list(what_would_fit(plan))
    predicted = step_time(workload.config, workload.model, plan.layout, workload.typical, world_size, rates)
    print(plan_text(plan, predicted, smallest_world(plan), changes))
    if all_ranks:
        traced, _ = traced_of(workload, world_size, limits)
        total = sum(distinct_parameters(traced, rank) for rank in range(world_size))
        print(f"all {world_size} ranks were built; their parameters, each counted once: {total:,}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, plan_page(plan, predicted))
        print(f"wrote {out}")
    return plan.fits


def calibrated_rates(run: Path, skip_files: bool) -> Rates:
    """Return the rates with which a measured run's step time is predicted as it was measured."""
    [record] = read_runs([run])
    refuse_rl(
        run / RUN_CONFIG, (), "most of its steps' time is that of rollouts; give --calibrate one of another stage"
    )
    config = load_config(RunConfig, run / RUN_CONFIG)
    # Its packs are those of a run that begins, which its own folder would refuse. Nothing is written.
    config.train.output_dir, config.checkpoint.resume = str(run / "begins"), "never"
    if not record.starts:
        raise ConfigError(f"--calibrate {run}: its log.txt does not say on how many processes it ran")
    processes = record.starts[-1].processes
    workload = read_workload(config, processes, skip_files)
    _, layout = traced_of(workload, processes, Limits())
    predicted = step_time(config, workload.model, layout, workload.typical, processes, Rates())
    return calibrated(Rates(), record.values("step_seconds"), predicted, str(run))
