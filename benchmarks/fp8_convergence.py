"""How FP8 recipes converge: held-out losses of the tiny models with and without FP8, which a CPU emulates.

    make demo-data && python -m benchmarks.fp8_convergence [--preset tiny_moe] [--recipes none,blockwise] [--out DIR]

Each recipe trains the same model on the same packs for STEPS steps, once per seed (of weights and of the order of
data), in float32 apart from what the recipe rounds. Runs that --out holds already are used again. The figure is the
held-out loss at the end: its mean over seeds less that without FP8, and the spread of the seeds without FP8, their
standard deviation. The limit is LIMIT spreads for the recipes whose scales belong to blocks. Draws the curves into
docs/images/fp8_convergence_PRESET.png, and exits with 1 if a recipe is above the limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from training.config import RunConfig, load_config
from training.loop import run

RECIPES = ("none", "tensorwise", "delayed", "blockwise", "mxfp8")
LIMITED = ("blockwise", "mxfp8")
SEEDS = (1, 2, 3)
STEPS = 300
LIMIT = 2.0  # spreads
HELD_OUT = ("captions", "ocr")
FIGURE = "docs/images/fp8_convergence_{}.png"

Losses = list[dict[int, float]]  # held-out loss by step, of each seed


def main() -> None:
    """Train what is missing, print the table, draw the curves; return by exit code whether the limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny_moe", help="tiny_moe or tiny_dense")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated; none always belongs to them")
    parser.add_argument("--out", type=Path, default=Path("demo_out/fp8_convergence"), help="folder of the runs")
    arguments = parser.parse_args()
    recipes = dict.fromkeys(["none", *arguments.recipes.split(",")])
    losses: dict[str, Losses] = {recipe: [] for recipe in recipes}
    for seed in SEEDS:
        for recipe in recipes:
            folder = arguments.out / f"{arguments.preset}_{recipe}_{seed}"
            losses[recipe].append(held_out_losses(arguments.preset, recipe, seed, folder))
    draw(losses, arguments.preset)
    sys.exit(0 if print_table(losses, arguments.preset) else 1)


def held_out_losses(preset: str, recipe: str, seed: int, folder: Path) -> dict[int, float]:
    """Return the held-out loss by step of one run, which is trained unless `folder` has it."""
    losses = read_losses(folder)
    if STEPS not in losses:
        shutil.rmtree(folder, ignore_errors=True)  # a run that was interrupted
        sources = ", ".join(f"{{path: demo_out/shards/held_out_{name}}}" for name in HELD_OUT)
        keys = {
            "model.preset": preset,
            "fp8.recipe": recipe,
            "train.seed": seed,
            "data.seed": seed,
            "train.steps": STEPS,
            "train.output_dir": folder,
            "checkpoint.save_interval": 0,
            "checkpoint.resume": "never",
            "validation.sources": f"[{sources}]",
            "validation.interval": STEPS // 12,
        }
        run(
            load_config(
                RunConfig, Path("configs/tiny/pretrain.yaml"), [f"{key}={value}" for key, value in keys.items()]
            )
        )
        losses = read_losses(folder)
    return losses


def read_losses(folder: Path) -> dict[int, float]:
    """Return the held-out losses that a run has written, by step."""
    file = folder / "validation.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {line["step"]: line["validation/loss"] for line in map(json.loads, lines)}


def print_table(losses: Mapping[str, Losses], preset: str) -> bool:
    """Print the losses at the end and return whether the limited recipes are within the limit."""
    last = {recipe: [seed[STEPS] for seed in seeds] for recipe, seeds in losses.items()}
    base, spread = mean(last["none"]), stdev(last["none"])
    names = [f"seed {seed}" for seed in SEEDS]
    table = Table("recipe", *names, "mean", "mean - none", "spreads", "limit", title=f"{preset}, step {STEPS}")
    is_within = True
    for recipe, values in last.items():
        distance = mean(values) - base
        limit = LIMIT if recipe in LIMITED else None
        is_within &= limit is None or abs(distance) <= limit * spread
        numbers = [f"{value:.4f}" for value in (*values, mean(values))]
        table.add_row(recipe, *numbers, f"{distance:+.4f}", f"{distance / spread:+.2f}", f"{limit:g}" if limit else "")
    console = Console(width=120)
    console.print(table)
    console.print(f"one spread, the standard deviation of the seeds without FP8: {spread:.4f}")
    return is_within


def draw(losses: Mapping[str, Losses], preset: str) -> None:
    """Draw the mean held-out losses, and their distance to those without FP8 of the same seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, distances = figure.subplots(1, 2)
    steps = sorted(losses["none"][0])
    for number, (recipe, seeds) in enumerate(losses.items()):
        color = f"C{number}"
        curves.plot(steps, [mean(seed[step] for seed in seeds) for step in steps], label=recipe, color=color)
        if recipe != "none":
            plot_distances(distances, steps, seeds, losses["none"], color)
    spread = [stdev(seed[step] for seed in losses["none"]) for step in steps]
    band = [LIMIT * value for value in spread]
    distances.fill_between(steps, [-value for value in band], band, color="gray", alpha=0.15, linewidth=0)
    distances.axhline(0, color="gray", linewidth=0.5)
    curves.set(xlabel="step", ylabel="held-out loss, mean of the seeds", xlim=(0, STEPS))
    distances.set(xlabel="step", ylabel="less that without FP8, same seed", xlim=(0, STEPS))
    curves.set_title(f"{preset}, FP8 emulated", loc="left", fontsize=10)
    distances.set_title(f"gray: {LIMIT:g} spreads of the seeds without FP8", loc="left", fontsize=10)
    curves.legend(frameon=False)
    figure.savefig(FIGURE.format(preset), dpi=110)


def plot_distances(axes: object, steps: Sequence[int], seeds: Losses, base: Losses, color: str) -> None:
    """Draw one recipe's distances: of each seed thin, of their mean thick."""
    pairs = [[own[step] - other[step] for step in steps] for own, other in zip(seeds, base, strict=True)]
    for pair in pairs:
        axes.plot(steps, pair, color=color, linewidth=0.5, alpha=0.6)  # type: ignore[attr-defined]
    axes.plot(steps, [mean(values) for values in zip(*pairs, strict=True)], color=color)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
