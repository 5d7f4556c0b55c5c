"""Compare runs on one page: curves, mixture, expert load, speed, and the difference of their configurations.

    python -m tools.report RUN [RUN...] [--out report.html] [--x step|tokens]

RUN is a run folder. The run may still be training, and runs may be of different lengths. The page is one file without
scripts or external links.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from common.files import write_text
from data_pipeline.domains import DOMAINS
from model.config import ConfigError
from model.moe import MODALITIES
from tools.errors import errors_in_one_line
from tools.help_text import keep_lines
from tools.report_charts import RUN_COLORS, Chart, Curve, curves_chart, shares_chart, short_number
from tools.report_runs import RunRecord, different_keys, read_runs
from training.grad_norms import PARTS as NORM_PARTS
from training.metrics import duration
from training.timers import PARTS as TIMED_PARTS

app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()
Section = tuple[str, list[Chart]]


class XAxis(StrEnum):
    """What the curves are drawn over."""

    step = "step"
    tokens = "tokens"


@app.command(help=keep_lines(__doc__))
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    x: Annotated[XAxis, typer.Option(help="what the curves are drawn over")] = XAxis.step,
) -> None:
    with errors_in_one_line(ConfigError):
        records = read_runs(runs)
        for number, record in enumerate(records):
            record.color, record.x_axis = RUN_COLORS[number % len(RUN_COLORS)], x.value
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page(records, "step" if x is XAxis.step else "useful tokens"))
    console.print(f"wrote {out}", markup=False, soft_wrap=True)


def page(runs: Sequence[RunRecord], x_label: str) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("tools", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    reasons: Counter[tuple[str, str]] = Counter()
    for run in runs:
        reasons.update(run.quarantined)
    return environment.get_template("report_page.html").render(
        runs=runs,
        facts=[(run, dict(facts(run))) for run in runs],
        sections=[(name, charts) for name, charts in sections(runs, x_label) if charts],
        differences=different_keys(runs),
        quarantined=[(shard, reason, [run.quarantined[shard, reason] for run in runs]) for shard, reason in reasons],
    )


def facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield the facts of a run's card."""
    yield "steps", f"{run.steps:,} of {run.steps_in_all:,}" if run.steps_in_all else f"{run.steps:,}"
    if not run.lines:
        return
    loss = run.last_loss()
    tokens = run.last("tokens_total") or sum(run.values("tokens"))
    yield "loss of the last steps", "not finite" if loss is None else f"{loss:.4f}"
    if validated := next((line["validation/loss"] for line in reversed(run.validation)), None):
        yield "validation loss", f"{validated:.4f}"
    yield "useful tokens", short_number(tokens)
    yield "tokens/s", f"{statistics.median(run.values('tokens_per_second')):,.0f}"
    if mfu := run.values("mfu"):
        yield "MFU", f"{statistics.median(mfu):.1%}"
    if memory := run.values("memory_gb"):
        yield "memory", f"{max(memory):.1f} GB"
    if waits := run.values("data_seconds"):
        yield "wait for data", f"{sum(waits) / sum(run.values('step_seconds')):.1%} of the time"
    yield "time in steps", duration(sum(run.values("step_seconds")))
    left = run.last("eta_seconds")
    if left and run.steps < run.steps_in_all:
        yield "time left", duration(left)
    if run.starts:
        yield "processes", " then ".join(dict.fromkeys(str(start.processes) for start in run.starts))
        yield "restarts", str(len(run.starts) - 1)
    yield "quarantined", f"{run.quarantined.total():,}"


# --- the charts -------------------------------------------------------------------------------------------------------


def sections(runs: Sequence[RunRecord], x_label: str) -> Iterator[Section]:
    """Yield the sections of the page with their charts; charts without data are omitted."""

    def chart(title: str, key: str, **options: object) -> Chart | None:
        curves = [Curve(run.curve(key), run.color) for run in runs]
        return curves_chart(title, curves, x_label, **options)  # type: ignore[arg-type]

    def held_out(title: str, key: str) -> Chart | None:
        return curves_chart(title, [Curve(run.curve(key, of_validation=True), run.color) for run in runs], x_label)

    domains = [domain for domain in DOMAINS if any(run.curve(f"loss/{domain}")[0] for run in runs)]
    yield (
        "Loss",
        _drawn(
            chart("all domains", "loss", note="cross-entropy per token that carries loss"),
            *(chart(domain, f"loss/{domain}") for domain in domains if len(domains) > 1),
        ),
    )
    yield (
        "Validation",
        _drawn(
            held_out("all domains, held out", "validation/loss"),
            *(held_out(f"{domain}, held out", f"validation/loss/{domain}") for domain in DOMAINS),
        ),
    )
    yield (
        "Optimizer",
        _drawn(
            chart("learning rate", "lr", from_zero=True),
            chart("gradient norm", "grad_norm", log=True, note="before clipping"),
            *(chart(f"gradient norm: {part}", f"grad_norm/{part}", log=True) for part in NORM_PARTS),
        ),
    )
    yield (
        "Data",
        _drawn(
            shares_chart(
                "mixture", _sums(runs, [f"tokens/{domain}" for domain in DOMAINS]), note="useful tokens by domain"
            ),
            chart("padding", "padding_fraction", percent=True, from_zero=True, note="share of the packs' tokens"),
            chart("images and frame pairs per step", "images", from_zero=True),
            chart("useful tokens per step", "tokens", from_zero=True),
        ),
    )
    yield (
        "Experts",
        _drawn(
            _expert_load(runs, x_label),
            *(
                chart(f"busiest expert: {kind} tokens", f"expert_load/{kind}/max", from_zero=True)
                for kind in MODALITIES
            ),
            chart("experts without a token in the step", "dead_experts", from_zero=True),
            chart("balance loss", "balance_loss", note="1: balanced"),
        ),
    )
    yield (
        "Speed",
        _drawn(
            chart("tokens per second", "tokens_per_second", from_zero=True),
            chart("MFU", "mfu", percent=True, from_zero=True, note="useful FLOPs over the devices' peak"),
            chart("seconds per step", "step_seconds", from_zero=True),
            chart("wait for data, seconds", "data_seconds", from_zero=True, note="of the slowest rank"),
            shares_chart(
                "where the time goes",
                _sums(runs, [f"seconds/{part}" for part in TIMED_PARTS]),
                note="each of its slowest rank",
            ),
            chart("memory, GB", "memory_gb", from_zero=True, note="of the fullest rank"),
        ),
    )


def _drawn(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _sums(runs: Sequence[RunRecord], keys: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the sum of each key over a run's steps, by the last part of the key, without those that are 0."""
    return {run.name: {key.split("/")[1]: total for key in keys if (total := sum(run.values(key))) > 0} for run in runs}


def _expert_load(runs: Sequence[RunRecord], x_label: str) -> Chart | None:
    curves = []
    for run in runs:
        curves.append(Curve(run.curve("expert_load/max"), run.color))
        curves.append(Curve(run.curve("expert_load/min"), run.color, dashed=True))
    note = "busiest (solid) and least busy expert (dashed) of any layer; 1: an even share"
    return curves_chart("expert load", curves, x_label, from_zero=True, note=note)


if __name__ == "__main__":
    app()
