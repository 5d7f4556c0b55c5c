"""The demo's figures, read from the runs' metrics, and its picture of the losses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from data_pipeline.domains import DOMAINS

FIRST_STEPS = 3  # the loss at a stage's start is the mean of so many steps
LAST_SHARE = 0.1  # and at its end that of the last tenth


@dataclass(frozen=True)
class Figures:
    """What one stage did. Losses are cross-entropies a token; tokens_per_second counts useful tokens."""

    steps: int
    first: float
    last: float
    tokens_per_second: float

    @property
    def fall(self) -> float:
        return 1 - self.last / self.first


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage_figures(metrics: Path) -> Figures:
    lines = read_metrics(metrics)
    losses = [line["loss"] for line in lines]
    last = losses[-max(1, round(len(losses) * LAST_SHARE)) :]
    first = losses[:FIRST_STEPS]
    return Figures(
        steps=len(lines),
        first=sum(first) / len(first),
        last=sum(last) / len(last),
        tokens_per_second=sum(line["tokens"] for line in lines) / sum(line["step_seconds"] for line in lines),
    )


def draw_losses(metrics: dict[str, Path], out: Path) -> Path:
    """One panel a stage: the loss of every step, and of each domain (thin), over the useful tokens seen."""
    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, (stage, path) in zip(panels, metrics.items(), strict=True):
        lines = read_metrics(path)
        seen = [sum(line["tokens"] for line in lines[: count + 1]) / 1000 for count in range(len(lines))]
        for domain in sorted({key for line in lines for key in line if key.startswith("loss/")}):
            points = [(x, line[domain]) for x, line in zip(seen, lines, strict=True) if domain in line]
            name = domain.removeprefix("loss/")
            color = f"C{DOMAINS.index(name)}"
            panel.plot(*zip(*points, strict=True), linewidth=0.7, alpha=0.7, color=color, label=name)
        panel.plot(seen, [line["loss"] for line in lines], color="black", linewidth=1.5, label="all")
        panel.set(title=stage, xlabel="thousand tokens", ylim=(0, None))
        panel.legend(fontsize="small")
    panels[0].set_ylabel("cross-entropy a token")
    figure.savefig(out, dpi=120)
    return out
