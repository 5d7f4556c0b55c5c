"""The report of a curation: how many samples remain after every filter, as a table, as JSON and as a chart."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from common.files import replacing
from data_pipeline.curation.decide import Funnel, Step

_KEPT_COLOUR, _FILTERED_COLOUR = "#3b6ea5", "#d9d9d9"


def funnel_table(funnel: Funnel) -> Table:
    """Return a table with one row per filter: the samples that it filtered, by domain and by reason."""
    domains = sorted(funnel.read)
    table = Table("filter", "samples", *domains, "reasons")

    def add(name: str, counts: Counter[str], reasons: str = "") -> None:
        table.add_row(name, f"{counts.total():,}", *(f"{counts[domain]:,}" for domain in domains), reasons)

    add("read", funnel.read)
    for step in _shown(funnel):
        name = f"{step.name} (only reports)" if step.report_only else step.name
        add(name, _by_domain(step), _reasons(_by_reason(step)))
    if funnel.unwritten:
        table.add_row("(writing)", f"{funnel.unwritten.total():,}", *("" for _ in domains), _reasons(funnel.unwritten))
    add("kept", funnel.kept)
    if funnel.recaptioned:
        failed = Counter(reason for _, reason in funnel.recaption_failures)
        shown = ", ".join(f"{count:,} failed: {reason}" for reason, count in failed.most_common(5))
        table.add_row("recaptioned", f"{funnel.recaptioned - failed.total():,}", *("" for _ in domains), shown)
    return table


def funnel_json(funnel: Funnel) -> dict[str, Any]:
    """Return the report for funnel.json."""
    return {
        "read": dict(sorted(funnel.read.items())),
        "steps": [
            {
                "filter": step.name,
                "report_only": step.report_only,
                "samples": step.samples.total(),
                "domains": dict(sorted(_by_domain(step).items())),
                "reasons": dict(sorted(_by_reason(step).items())),
            }
            for step in funnel.steps
        ],
        "unwritten": dict(sorted(funnel.unwritten.items())),
        "kept": dict(sorted(funnel.kept.items())),
        "recaptioned": funnel.recaptioned - len(funnel.recaption_failures),
        "recaption_failures": dict(sorted(Counter(reason for _, reason in funnel.recaption_failures).items())),
    }


def draw_funnel(funnel: Funnel, path: Path) -> None:
    """Write a PNG with one bar per filter: the samples that remain, and in grey those that it filtered."""
    filtered = [(step.name, step.samples.total()) for step in _shown(funnel) if not step.report_only]
    if funnel.unwritten:
        filtered.append(("(writing)", funnel.unwritten.total()))
    counts = [samples for _, samples in filtered]
    remaining = list(accumulate(counts, lambda rest, removed: rest - removed, initial=funnel.read.total()))
    figure = Figure(figsize=(8, 0.9 + 0.34 * len(remaining)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    bars = range(len(remaining))
    axes.barh(bars, remaining, color=_KEPT_COLOUR)
    axes.barh(bars[1:], counts, left=remaining[1:], color=_FILTERED_COLOUR)
    axes.set_yticks(bars, ["read", *(name for name, _ in filtered)])
    axes.invert_yaxis()
    for bar, (rest, removed) in enumerate(zip(remaining, [0, *counts], strict=True)):
        axes.annotate(f" {rest:,}" + (f"  (−{removed:,})" if removed else ""), (rest + removed, bar), va="center")
    axes.set_xlim(0, max(remaining) * 1.25)
    axes.set_xlabel("remaining samples")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _shown(funnel: Funnel) -> list[Step]:
    """Return the steps to show. Reading itself is shown only if it failed for a sample."""
    reading, *steps = funnel.steps
    return [reading, *steps] if reading.samples else steps


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def _by_domain(step: Step) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (domain, _), count in step.samples.items():
        counts[domain] += count
    return counts


def _by_reason(step: Step) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (_, reason), count in step.samples.items():
        counts[reason] += count
    return counts
