"""The drawings of the report, as SVG texts that stand in the page: curves over the run, and bars of shares."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from tools.report_runs import Points

RUN_COLORS = ("#2563eb", "#e4572e", "#0d9488", "#9333ea", "#ca8a04", "#db2777", "#4d7c0f", "#475569")
SHARE_COLORS = ("#2f6690", "#81a4cd", "#16808a", "#d9a441", "#c8553d", "#6d597a", "#8d99ae")
INK, GRID, PALE = "#334155", "#e2e8f0", "#94a3b8"
MOST_POINTS = 1500  # of a curve: more are averaged in groups
SMOOTHED = 60  # a curve of more points than this is drawn smoothed, above its raw values
WIDTH, HEIGHT = 5.4, 2.75  # inches
STYLE: dict[Any, Any] = {  # of matplotlib, which types its keys as the union of all their names
    "svg.fonttype": "none",
    "svg.hashsalt": "glmv",  # the same data give the same page
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called a$b$c
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Curve:
    """One curve of a chart."""

    points: Points
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading."""

    title: str
    svg: str
    note: str = ""


def curves_chart(
    title: str,
    curves: Sequence[Curve],
    x_label: str,
    *,
    note: str = "",
    log: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    labels: Sequence[str] = (),
) -> Chart | None:
    """Draw curves over one x axis; None where none has a point.

    Args:
        title: heading.
        curves: what to draw.
        x_label: of the x axis.
        note: a line below the heading.
        log: a logarithmic y axis, unless a value is 0 or less.
        percent: y values are shares.
        from_zero: the y axis begins at 0.
        labels: of the curves, for a legend; empty: there is none.
    """
    shown = [curve for curve in curves if curve.points[0]]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for curve in shown:
            _draw(axes, curve)
        smallest = min(min(curve.points[1]) for curve in shown)
        if log and smallest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        elif from_zero and smallest >= 0:
            axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        elif axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(length=0)
        axes.set_xlabel(x_label, color=PALE, fontsize=8, loc="right")
        axes.margins(x=0.01)
        for label, curve in zip(labels, curves, strict=False):
            axes.plot([], [], color=curve.color, label=label)
        if labels:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=1.2)
        return Chart(title, as_svg(figure), note)


def short_number(value: float) -> str:
    """Return a number as a tick of an axis shows it.

    >>> short_number(0.5), short_number(1500), short_number(2e9), short_number(0.0003)
    ('0.5', '1.5k', '2B', '3e-4')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def _draw(axes: Axes, curve: Curve) -> None:
    x, y = (np.array(values) for values in curve.points)
    group = -(-len(x) // MOST_POINTS)
    if group > 1:
        x, y = (_group_means(values, group) for values in (x, y))
    style = "--" if curve.dashed else "-"
    if len(x) > SMOOTHED:
        axes.plot(x, y, color=curve.color, linewidth=0.6, alpha=0.28)
        y = _smooth(y, max(3, len(y) // 40))
    marker = "o" if len(x) == 1 else None
    axes.plot(x, y, style, color=curve.color, linewidth=1.6, marker=marker, markersize=3, solid_capstyle="round")


def _group_means(values: np.ndarray, group: int) -> np.ndarray:
    starts = np.arange(0, len(values), group)
    return np.add.reduceat(values, starts) / np.diff([*starts, len(values)])


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the means over a window of `width` values, shorter at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    begin, end = np.maximum(positions - width // 2, 0), np.minimum(positions + width // 2 + 1, len(values))
    return (sums[end] - sums[begin]) / (end - begin)


def shares_chart(title: str, runs: Mapping[str, Mapping[str, float]], *, note: str = "") -> Chart | None:
    """Draw one bar of shares per run; None where no run has any.

    Args:
        title: heading.
        runs: amounts by name, of each run.
        note: a line below the heading.
    """
    rows = {run: amounts for run, amounts in runs.items() if sum(amounts.values()) > 0}
    if not rows:
        return None
    names = list(dict.fromkeys(name for amounts in rows.values() for name in amounts))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.95 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for row, amounts in enumerate(rows.values()):
            total, left = sum(amounts.values()), 0.0
            for name, amount in amounts.items():
                share, color = amount / total, SHARE_COLORS[names.index(name) % len(SHARE_COLORS)]
                axes.barh(row, share, left=left, height=0.66, color=color, edgecolor="white", linewidth=1)
                if share > 0.06:
                    axes.text(
                        left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8
                    )
                left += share
        for number, name in enumerate(names):
            axes.barh(0, 0, color=SHARE_COLORS[number % len(SHARE_COLORS)], label=name)
        axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, 1), xticks=[])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=8, handlelength=0.8)
        return Chart(title, as_svg(figure), note)


def as_svg(figure: Figure) -> str:
    """Return a figure as an <svg> that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
