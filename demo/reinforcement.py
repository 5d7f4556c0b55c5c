"""Reinforcement learning in minutes on two CPU cores: `python -m demo.reinforcement`, or `make demo-rl`.

A tiny GLM-4.1V learns from 300 handwritten digits how to answer, and is right about half of the time. Then it answers
other images by itself, and learns from the rewards of its answers alone. Exits with 1 if the reward or the accuracy on
held-out images does not rise.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_pipeline.errors import DataError
from demo.__main__ import OUT, Stage, console, train
from demo.errors import DemoError
from tools.errors import errors_in_one_line

if TYPE_CHECKING:
    from demo.report import Row

START, LEARN = Stage("rl_start", "pretrain.train"), Stage("rl", "rl.train")
STEPS = {START: 170, LEARN: 24}
REWARD_GAIN, ACCURACY_GAIN = 0.10, 0.0  # least gains
AVERAGED = 3  # iterations whose rewards are averaged at the beginning and at the end


def main() -> None:
    """Let a tiny GLM-V learn from rewards."""
    with errors_in_one_line(DemoError, DataError):
        passed = run()
    raise typer.Exit(0 if passed else 1)


def run() -> bool:
    """Run both stages and print the report; return whether the required figures were met."""
    from demo.digits import build
    from demo.report import read_metrics, table

    started = time.monotonic()
    digits, runs = OUT / "digits", OUT / "runs" / "rl"
    for stale in (digits, runs):
        shutil.rmtree(stale, ignore_errors=True)
    with console.status("building shards of handwritten digits"):
        build(digits)
    console.print("Training a tiny GLM-4.1V on 2 processes: first on answers, then on rewards")
    train(START, STEPS[START], runs / START.name, [])
    folder = runs / LEARN.name
    train(LEARN, STEPS[LEARN], folder, [f"model.init_from={runs / START.name}"], shown="reward")
    lines, validation = read_metrics(folder / "metrics.jsonl"), read_metrics(folder / "validation.jsonl")
    rows = rows_of(lines, validation)
    console.print(table("GLM-4.1V, rewards", rows))
    console.print(f"\ncurves    {draw(lines, validation, folder / 'reward.png')}")
    console.print(f"page      python -m tools.report {folder}      with its rollouts and their images")
    console.print(f"took      {time.monotonic() - started:.0f} s")
    return all(row.met for row in rows)


def rows_of(lines: list[dict[str, Any]], validation: list[dict[str, Any]]) -> list[Row]:
    """Return what the rewards and the held-out accuracy were at the beginning and at the end."""
    from demo.report import Row

    first, last = (sum(line["reward"] for line in part) / len(part) for part in (lines[:AVERAGED], lines[-AVERAGED:]))
    before, after = (validation[place]["validation/accuracy"] for place in (0, -1))
    held_out, rollouts = validation[0]["validation/samples"], sum(line["rollouts"] for line in lines)
    return [
        Row(
            what="reward of rollouts",
            measured=f"{first:.2f} -> {last:.2f} ({rollouts:,.0f} rollouts)",
            required=f"rises by {REWARD_GAIN:.2f}",
            met=last - first >= REWARD_GAIN,
            steps=str(len(lines)),
        ),
        Row(
            what="right answers, held out",
            measured=f"{before:.0%} -> {after:.0%} of {held_out} images",
            required="rises",
            met=after - before > ACCURACY_GAIN,
        ),
    ]


def draw(lines: list[dict[str, Any]], validation: list[dict[str, Any]], path: Path) -> Path:
    """Draw the reward of the rollouts and the accuracy on held-out images over the iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["reward"] for line in lines], label="reward of rollouts")
    steps, right = zip(*((line["step"], line["validation/accuracy"]) for line in validation), strict=True)
    axes.plot(steps, right, "o-", label="right answers, held out")
    axes.set_xlabel("iteration")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    typer.run(main)
