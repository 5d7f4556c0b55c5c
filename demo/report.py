"""The demo's report: its table, the loss curves and the images with the model's answers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from data_pipeline.domains import DOMAINS

FIRST_STEPS = 3  # the loss at the start of a stage is the mean of these steps
LAST_SHARE = 0.1  # and at its end the mean of this share of its steps
ANSWER_WIDTH = 46  # characters per line under an image

LOSS_FALL = 0.30  # least fall of the loss in every stage
PARITY = 1e-4  # largest relative difference between the production loss and transformers'
IMAGE_RATIO = 1.5  # least loss of descriptions with another image, over that with their own
RIGHT = 0.80  # least share of right answers
RIGHT_OTHER_IMAGE = 0.20  # largest share of right answers when another image is shown


@dataclass(frozen=True)
class Figures:
    """What one stage measured."""

    steps: int
    first: float  # cross-entropy per token
    last: float  # cross-entropy per token
    tokens_per_second: float  # useful tokens, not padding

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


# The table


@dataclass(frozen=True)
class Row:
    """One measured figure and what is required of it."""

    what: str
    measured: str
    required: str
    met: bool
    steps: str = ""
    tokens_per_second: str = ""


def stage_row(name: str, figures: Figures) -> Row:
    return Row(
        what=f"{name} loss",
        measured=f"{figures.first:.3f} -> {figures.last:.3f} ({-figures.fall:.0%})",
        required=f"falls by {LOSS_FALL:.0%}",
        met=figures.fall >= LOSS_FALL,
        steps=str(figures.steps),
        tokens_per_second=f"{figures.tokens_per_second:,.0f}",
    )


def held_out_rows(production: dict[str, Any], exported: dict[str, Any]) -> list[Row]:
    """Return the rows of `demo.evaluate`'s two results."""
    difference = abs(production["loss"] - exported["loss"]) / exported["loss"]
    ratio = exported["other_image"] / exported["own_image"]
    questions = exported["questions"]
    return [
        Row(
            what="held out: production, transformers",
            measured=f"{production['loss']:.6f}, {exported['loss']:.6f} ({difference:.0e})",
            required=f"within {PARITY:.0e}",
            met=difference <= PARITY,
        ),
        Row(
            what="descriptions: own, another's image",
            measured=f"{exported['own_image']:.3f}, {exported['other_image']:.3f} (x{ratio:.1f})",
            required=f"rises to x{IMAGE_RATIO}",
            met=ratio >= IMAGE_RATIO,
        ),
        Row(
            what="right answers: own image",
            measured=f"{exported['right']:.0%} of {questions} questions",
            required=f"at least {RIGHT:.0%}",
            met=exported["right"] >= RIGHT,
        ),
        Row(
            what="right answers: another's image",
            measured=f"{exported['right_other_image']:.0%} of {questions} questions",
            required=f"at most {RIGHT_OTHER_IMAGE:.0%}",
            met=exported["right_other_image"] <= RIGHT_OTHER_IMAGE,
        ),
    ]


def table(name: str, rows: Sequence[Row]) -> Table:
    made = Table("", "steps", "measured", "tokens/s", "required", "", title=f"tiny {name}")
    for row in rows:
        verdict = "[green]met[/green]" if row.met else "[red]MISSED[/red]"
        made.add_row(row.what, row.steps, row.measured, row.tokens_per_second, row.required, verdict)
    return made


# The drawings


def draw_losses(metrics: dict[str, Path], out: Path) -> Path:
    """Draw the loss of every step, and of each domain (thin), over the useful tokens seen: one panel per stage."""
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
        panel.legend(fontsize="small", loc="upper right")
    panels[0].set_ylabel("cross-entropy per token")
    figure.savefig(out, dpi=120)
    return out


def draw_answers(shown: Sequence[dict[str, str]], out: Path) -> Path:
    """Draw each image with its questions and the model's answers below it.

    Args:
        shown: dicts of image (path), question and answer.
        out: PNG file to write.

    Returns:
        out.
    """
    images = list(dict.fromkeys(entry["image"] for entry in shown))
    figure = Figure(figsize=(4.6 * len(images), 6.4), layout="constrained")
    for column, image in enumerate(images):
        upper, lower = (figure.add_subplot(2, len(images), row * len(images) + column + 1) for row in (0, 1))
        upper.imshow(Image.open(image))
        upper.set_anchor("SW")
        lines = [line for entry in shown if entry["image"] == image for line in _written(entry)]
        for number, (line, style) in enumerate(lines):
            lower.text(0, 1 - number / 13, line, va="top", fontsize=9.5, parse_math=False, **style)
        for axes in (upper, lower):
            axes.axis("off")
    figure.savefig(out, dpi=120)
    return out


def _written(entry: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the lines of a question and its answer, with their text properties."""
    grey, black = {"color": "grey"}, {"color": "black", "family": "monospace"}
    question, answer = (textwrap.wrap(entry[key], ANSWER_WIDTH) for key in ("question", "answer"))
    return [*((line, grey) for line in question), *((line, black) for line in answer), ("", grey)]
