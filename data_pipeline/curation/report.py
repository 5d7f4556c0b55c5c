"""The account of a curation: a table, numbers, and a picture of how many samples every filter let through."""

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

_BAR, _GONE = "#3b6ea5", "#d9d9d9"


def funnel_table(funnel: Funnel) -> Table:
    """A line a filter, top to bottom: samples that it took, their reasons, and by domain."""
    domains = sorted(funnel.read)
    table = Table("filter", "samples", *domains, "reasons")

    def line(name: str, counts: Counter[str], reasons: str = "") -> None:
        table.add_row(name, f"{counts.total():,}", *(f"{counts[domain]:,}" for domain in domains), reasons)

    line("read", funnel.read)
    for step in _shown(funnel):
        name = f"{step.name} (only reports)" if step.report_only else step.name
        line(name, _by(step, 0), _reasons(_by(step, 1)))
    if funnel.unwritten:
        table.add_row("(writing)", f"{funnel.unwritten.total():,}", *("" for _ in domains), _reasons(funnel.unwritten))
    line("kept", funnel.kept)
    if funnel.recaptioned:
        failed = Counter(reason for _, reason in funnel.recaption_failures)
        shown = ", ".join(f"{count:,} failed: {reason}" for reason, count in failed.most_common(5))
        table.add_row("recaptioned", f"{funnel.recaptioned - failed.total():,}", *("" for _ in domains), shown)
    return table


def funnel_json(funnel: Funnel) -> dict[str, Any]:
    """The same for programs."""
    return {
        "read": dict(sorted(funnel.read.items())),
        "steps": [
            {
                "filter": step.name,
                "report_only": step.report_only,
                "samples": step.samples.total(),
                "domains": dict(sorted(_by(step, 0).items())),
                "reasons": dict(sorted(_by(step, 1).items())),
            }
            for step in funnel.steps
        ],
        "unwritten": dict(sorted(funnel.unwritten.items())),
        "kept": dict(sorted(funnel.kept.items())),
        "recaptioned": funnel.recaptioned - len(funnel.recaption_failures),
        "recaption_failures": dict(sorted(Counter(reason for _, reason in funnel.recaption_failures).items())),
    }


def draw_funnel(funnel: Funnel, path: Path) -> None:
    """A PNG: a bar for what is left after every filter, grey where samples went."""
    taken = [(step.name, step.samples.total()) for step in _shown(funnel) if not step.report_only]
    if funnel.unwritten:
        taken.append(("(writing)", funnel.unwritten.total()))
    gone = [samples for _, samples in taken]
    left = list(accumulate(gone, lambda rest, less: rest - less, initial=funnel.read.total()))
    figure = Figure(figsize=(8, 0.9 + 0.34 * len(left)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(left))
    axes.barh(places, left, color=_BAR)
    axes.barh(places[1:], gone, left=left[1:], color=_GONE)
    axes.set_yticks(places, ["read", *(name for name, _ in taken)])
    axes.invert_yaxis()
    for place, (rest, less) in enumerate(zip(left, [0, *gone], strict=True)):
        axes.annotate(f" {rest:,}" + (f"  (−{less:,})" if less else ""), (rest + less, place), va="center")
    axes.set_xlim(0, max(left) * 1.25)
    axes.set_xlabel("samples left")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _shown(funnel: Funnel) -> list[Step]:
    """Reading itself is shown only where it failed."""
    reading, *steps = funnel.steps
    return [reading, *steps] if reading.samples else steps


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def _by(step: Step, part: int) -> Counter[str]:
    """Samples by domain (part 0) or by reason (1)."""
    counts: Counter[str] = Counter()
    for names, count in step.samples.items():
        counts[names[part]] += count
    return counts
