"""A plan as a page: the stages, what each needs and sends, and where the time goes. One file, without scripts."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from planning.limits import GIB
from planning.plan import Plan
from planning.step_time import StepTime
from tools.plan_table import head_lines, header, parts_of, stage_rows
from tools.report_charts import GRID, INK, SHARE_COLORS, STYLE, WIDTH, Chart, as_svg, shares_chart


def plan_page(plan: Plan, predicted: StepTime) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("tools", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("plan_page.html").render(
        facts=[(line[:16].strip(), line[16:]) for line in head_lines(plan, predicted)],
        fits=plan.fits,
        charts=list(charts(plan, predicted)),
        header=header(plan),
        rows=list(stage_rows(plan)),
    )


def charts(plan: Plan, predicted: StepTime) -> Iterator[Chart]:
    """Yield the drawings."""
    yield memory_chart(plan)
    names = {
        f"rank {rank}": {f"stage {n}": float(plan.layout.stage_costs[n]) for n in stages}
        for rank, stages in _stages_of_ranks(plan).items()
    }
    parts = shares_chart("Where the time goes", {"step": predicted.parts}, note="predicted, of the slowest stage")
    sent = {
        f"rank {stage.trace.pipeline_rank}": {kind: float(size) for kind, size in stage.trace.traffic.items()}
        for stage in plan.stages
    }
    shares = shares_chart("What a rank sends, by group", sent, note="shares of its bytes per step")
    yield stages_chart(plan, names)
    yield from (chart for chart in (parts, shares) if chart is not None)


def memory_chart(plan: Plan) -> Chart:
    """Draw what the fullest rank of every stage needs, beside the memory of a GPU."""
    limits = plan.limits
    reserved = limits.context + limits.nccl + limits.workspaces
    bars = {
        f"rank {stage.trace.pipeline_rank}": {
            **{part: getattr(stage, part) / GIB for part in parts_of(plan)},
            "fragmentation": stage.tensors * limits.fragmentation / GIB,
            "reserved": reserved,
        }
        for stage in plan.stages
    }
    return _bars("Memory of the fullest rank of each stage, GiB", bars, "the line is the GPU", limits.gpu_memory)


def stages_chart(plan: Plan, costs: dict[str, dict[str, float]]) -> Chart:
    """Draw the cost of the stages of every pipeline rank, over the mean."""
    mean = sum(plan.layout.rank_costs) / len(plan.layout.rank_costs)
    shown = {rank: {name: cost / mean for name, cost in stages.items()} for rank, stages in costs.items()}
    return _bars(
        "Cost of the pipeline stages", shown, "FLOPs over the mean of the ranks; the line is an even share", 1.0
    )


def _stages_of_ranks(plan: Plan) -> dict[int, range]:
    size = plan.layout.pipeline_size
    return {rank: range(rank, len(plan.layout.stages), size) for rank in range(size)}


def _bars(title: str, bars: dict[str, dict[str, float]], note: str, limit: float) -> Chart:
    names = list(dict.fromkeys(name for amounts in bars.values() for name in amounts))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.1 + 0.3 * len(bars)), layout="constrained")
        axes = figure.subplots()
        for row, amounts in enumerate(bars.values()):
            left = 0.0
            for name, amount in amounts.items():
                color = SHARE_COLORS[names.index(name) % len(SHARE_COLORS)]
                axes.barh(row, amount, left=left, height=0.66, color=color, edgecolor="white", linewidth=1)
                left += amount
        for number, name in enumerate(names):
            axes.barh(0, 0, color=SHARE_COLORS[number % len(SHARE_COLORS)], label=name)
        axes.axvline(limit, color=INK, linewidth=1)
        axes.set(yticks=range(len(bars)), yticklabels=list(bars))
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        figure.legend(loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=8, handlelength=0.8)
        return Chart(title, as_svg(figure), note)
