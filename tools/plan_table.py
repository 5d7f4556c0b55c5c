"""The text of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from model.flops import FORWARD_AND_BACKWARD, decoder_cost, vision_cost
from planning.alternatives import Smallest
from planning.assumptions import not_planned
from planning.limits import GIB
from planning.plan import Plan
from planning.search import Found
from planning.step_time import StepTime

SEARCHED = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
PARTS = ("weights", "gradients", "optimizer", "engine", "activations")  # of StagePlan, GiB


def plan_text(plan: Plan, predicted: StepTime, smallest: Smallest, changes: Sequence[str]) -> str:
    """Return a plan as text."""
    lines = [*head_lines(plan, predicted), "", "what the fullest rank of a stage needs, GiB:"]
    return "\n".join([*lines, *_table([header(plan), *stage_rows(plan)]), "", *_verdict(plan, smallest, changes)])


def time_text(predicted: StepTime, updates: int = 1) -> str:
    """Return the seconds of a step, or of each of its updates, and of their largest parts."""
    largest = sorted(predicted.parts.items(), key=lambda part: -part[1])[:5]
    shares = ", ".join(f"{name} {seconds / predicted.seconds:.0%}" for name, seconds in largest)
    what = "step" if updates == 1 else f"update, of which a step has {updates}"
    return f"about {predicted.seconds:.3g} s per {what}, good to compare layouts with, no promise ({shares})"


def search_text(found: Found, processes: int) -> str:
    """Return the result of a search as text."""
    lines = [f"{found.possible:,} layouts are possible on {processes} GPUs; {found.built} were built"]
    if found.left:
        lines.append(f"time was up: {found.left:,} of them, predicted to be slower, were not looked at")
    if not found.fitting:
        said = "none that was looked at fits" if found.left else "none of them fits"
        return "\n".join([*lines, f"{said}: take more GPUs, or optimizer.main_grads=bf16"])
    rows = [["seconds", "needed GiB", "TP", "CP", "PP", "VPP", "EP", "decoder recompute", "largest parts"]]
    for one in found.fitting:
        parallel, plan = one.workload.config.parallel, one.plan
        assert plan is not None
        sizes = [getattr(parallel, name) for name in SEARCHED]
        largest = sorted(one.time.parts.items(), key=lambda part: -part[1])[:3]
        shares = ", ".join(f"{name} {seconds / one.time.seconds:.0%}" for name, seconds in largest)
        needed = f"{plan.limits.needed(plan.worst.tensors) / GIB:.1f}"
        recompute = one.workload.config.recompute.decoder
        rows.append([f"{one.time.seconds:.3g}", needed, *map(str, sizes), recompute, shares])
    best = found.fitting[0].workload.config
    rest = [f"differs: {setting}" for setting in not_planned(best)]
    keys = " ".join(f"parallel.{name}={getattr(best.parallel, name)}" for name in SEARCHED)
    more = f" parallel.sequence_parallel={str(best.parallel.sequence_parallel).lower()}"
    more += f" recompute.decoder={best.recompute.decoder} recompute.vision=full"
    more += f" data.segment_multiple={best.data.segment_multiple}"
    return "\n".join([*lines, *_table(rows), *rest, "the first as keys:", keys + more])


def head_lines(plan: Plan, predicted: StepTime) -> Iterator[str]:
    """Yield the facts of a plan, each with its name first."""
    workload, parallel = plan.workload, plan.workload.config.parallel
    train = workload.config.train
    yield f"model           {plan.parameters:,} parameters, {workload.model.variant}"
    yield (
        f"layout          {plan.processes} GPUs: TP {parallel.tensor_model_parallel_size} x "
        f"CP {parallel.context_parallel_size} x PP {parallel.pipeline_model_parallel_size} x "
        f"VPP {parallel.virtual_pipeline_model_parallel_size} x DP {parallel.data_parallel_size(plan.processes)}; "
        f"experts: EP {parallel.expert_model_parallel_size} x ETP {parallel.expert_tensor_parallel_size}"
    )
    rollouts = workload.rollouts
    step, expected = ("step", "") if rollouts is None else ("update", ", expected")
    yield (
        f"{step:16}{train.global_batch_size:,} packs of {train.seq_length:,} tokens{expected}, {plan.packs_per_rank:,} "
        f"on each data-parallel rank; {step_flops(plan):.3g} FLOPs, recomputation excluded"
    )
    yield from (f"{name:16}{said}" for name, said in (rollouts.facts if rollouts else ()))
    yield f"pack            {workload.source}: {workload.fullest.describe()}"
    yield f"memory          {plan.limits.describe()}"
    yield f"bubble          {plan.bubble:.1%} of {'a step' if rollouts is None else 'an update'}"
    yield f"checkpoint      {plan.checkpoint_bytes / 1e9:,.0f} GB"
    yield f"time            {time_text(predicted, rollouts.updates if rollouts else 1)}"
    yield from (f"not planned     {what}" for what in (rollouts.unknown if rollouts else ()))
    yield from (f"differs         {setting}" for setting in not_planned(workload.config))


def step_flops(plan: Plan) -> float:
    """Return the FLOPs of a step of typical packs, forward and backward."""
    workload, train = plan.workload, plan.workload.config.train
    tokens = sum(workload.typical.lengths)
    decoder, vision = decoder_cost(workload.model.decoder), vision_cost(workload.model.vision)
    once = decoder.of(*workload.typical.lengths) + vision.of(*workload.typical.patches)
    return FORWARD_AND_BACKWARD * once * train.global_batch_size * train.seq_length / tokens


def parts_of(plan: Plan) -> list[str]:
    """Return the parts of a rank's memory, as StagePlan names them; the engine only where there is one."""
    with_engine = any(stage.engine for stage in plan.stages)
    return [part for part in PARTS if part != "engine" or with_engine]


def header(plan: Plan) -> list[str]:
    """Return the names of what `stage_rows` gives; GiB."""
    return ["pipeline rank", "holds", *parts_of(plan), "needed", "parameters"]


def stage_rows(plan: Plan) -> Iterator[list[str]]:
    """Yield a row for each pipeline stage; GiB."""
    for stage in plan.stages:
        trace, size = stage.trace, plan.layout.pipeline_size
        held = [plan.layout.stages[n] for n in range(trace.pipeline_rank, len(plan.layout.stages), size)]
        sizes = [*(getattr(stage, part) for part in parts_of(plan)), plan.limits.needed(stage.tensors)]
        gib = [f"{size / GIB:.2f}" for size in sizes]
        yield [str(trace.pipeline_rank), " | ".join(map(_units, held)), *gib, f"{trace.parameters:,}"]


def _units(units: Sequence[str]) -> str:
    layers = units.count("decoder")
    others = [unit for unit in units if unit != "decoder"]
    return " + ".join([*(["embedding"] if "embedding" in others else []), f"{layers}"] + ["loss"] * ("loss" in others))


def _verdict(plan: Plan, smallest: Smallest, changes: Sequence[str]) -> Iterator[str]:
    yield f"sent per {'step' if plan.workload.rollouts is None else 'update'} by a rank of each stage, GB:"
    kinds = list(dict.fromkeys(kind for stage in plan.stages for kind in stage.trace.traffic))
    rows = [["pipeline rank", *kinds]]
    for stage in plan.stages:
        sent = [f"{stage.trace.traffic.get(kind, 0) / 1e9:.2f}" for kind in kinds]
        rows.append([str(stage.trace.pipeline_rank), *sent])
    yield from _table(rows)
    yield ""
    worst, limits = plan.worst, plan.limits
    needed = f"pipeline rank {worst.trace.pipeline_rank} needs {limits.needed(worst.tensors) / GIB:.1f} GiB"
    yield f"{'fits' if plan.fits else 'DOES NOT FIT'}: {needed} of {limits.gpu_memory:g}"
    if smallest.processes is not None:
        yield f"smallest number of GPUs for this layout: {smallest.processes}; {smallest.reason}"
    else:
        yield f"this layout fits on no number of GPUs: {smallest.reason}"
    if changes:
        yield "it would fit with one of these (what they need):"
        yield from (f"  {change}" for change in changes)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
