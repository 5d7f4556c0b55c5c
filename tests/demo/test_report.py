"""The demo's report: honest figures, verdicts, and a table that fits the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from demo.__main__ import error_lines
from demo.report import Figures, draw_answers, held_out_rows, stage_figures, stage_row, table

pytestmark = pytest.mark.fast

PRODUCTION = {"loss": 2.00001}
EXPORTED = {
    "loss": 2.0,
    "own_image": 0.5,
    "other_image": 2.0,
    "questions": 84,
    "right": 0.95,
    "right_other_image": 0.01,
}


def test_stage_figures_are_means_over_the_first_and_last_steps(tmp_path: Path) -> None:
    losses = [6.0, 5.0, 4.0, *[3.0] * 15, 2.0, 1.0]
    lines = [{"loss": loss, "tokens": 100, "step_seconds": 0.5} for loss in losses]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = stage_figures(tmp_path / "metrics.jsonl")
    assert (figures.steps, figures.first, figures.last, figures.tokens_per_second) == (20, 5.0, 1.5, 200.0)
    assert figures.fall == pytest.approx(0.7)


def test_good_figures_meet_every_requirement() -> None:
    assert all(row.met for row in held_out_rows(PRODUCTION, EXPORTED))
    assert stage_row("sft", Figures(10, first=2.0, last=1.0, tokens_per_second=9.0)).met


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        ({"loss": 2.0003}, "held out"),
        ({"other_image": 0.6}, "descriptions"),
        ({"right": 0.79}, "right answers: own image"),
        ({"right_other_image": 0.21}, "right answers: another's image"),
    ],
)
def test_a_bad_figure_misses_its_requirement_alone(worse: dict[str, float], missed: str) -> None:
    rows = [row for row in held_out_rows(PRODUCTION, {**EXPORTED, **worse}) if not row.met]
    assert [row.what.startswith(missed) for row in rows] == [True]


def test_a_stage_that_does_not_learn_misses_its_requirement() -> None:
    assert not stage_row("sft", Figures(10, first=2.0, last=1.5, tokens_per_second=9.0)).met


def test_table_fits_110_columns() -> None:
    out = io.StringIO()
    rows = [
        stage_row("long_context", Figures(1000, 12.345678, 1.234567, 12345.6)),
        *held_out_rows(PRODUCTION, EXPORTED),
    ]
    Console(file=out, width=110).print(table("GLM-4.5V", rows))
    printed = out.getvalue()
    assert "…" not in printed
    assert all(any(row.what in line and row.measured in line for line in printed.splitlines()) for row in rows)


def test_answers_are_drawn_beside_their_images(tmp_path: Path) -> None:
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    shown: list[dict[str, Any]] = []
    for name, colour in colours.items():
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
        shown += [{"image": str(tmp_path / f"{name}.png"), "question": "Costs $1 or $2?", "answer": a} for a in "ab"]
    drawn = np.asarray(Image.open(draw_answers(shown, tmp_path / "answers.png")).convert("RGB"))
    found = {name: np.argwhere((drawn == colour).all(-1)) for name, colour in colours.items()}
    assert all(len(pixels) > 10_000 for pixels in found.values())
    assert found["red"][:, 1].max() < found["blue"][:, 1].min()


def test_errors_of_every_process_are_found_in_the_output() -> None:
    torchrun = "W1127 torch/distributed/run.py\n"
    output = f"{torchrun}error on rank 1: no memory\nerror on rank 1: no memory\nerror: bad key\n{torchrun}"
    assert error_lines(output) == ["no memory", "bad key"]
    assert error_lines(torchrun * 30) == [torchrun.strip()] * 25
