"""What reinforcement learning gains on a small visual task, and what curriculum sampling saves.

    python -m benchmarks.learning                  three seeds, all prompts answerable
    python -m benchmarks.learning --unanswerable   half of the prompts cannot be answered: RLCS beside uniform draws

A tiny GLM-4.1V has learned from 300 handwritten digits how to answer, and learns from rewards alone on 1,000 others
(demo.digits); 497 are held out. Each run is `rl.train` in one process of one thread, and takes minutes. Limits:

    reward of the rollouts     rises by 0.10 in every seed
    greedy held-out accuracy   falls in no seed, and rises by 0.05 in the mean
    rollouts                   RLCS reaches the accuracy at which uniform draws end with 0.8 of their rollouts (median)
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import write_json
from demo.digits import build
from demo.report import read_metrics

AVERAGED = 3
DONE = "benchmark.json"  # in the folder of a run that is complete
REWARD_GAIN, MEAN_ACCURACY_GAIN, ROLLOUTS_SHARE = 0.10, 0.05, 0.8
COLORS = ("#2563eb", "#e4572e", "#0d9488")
TIERS = ("hardest", "tier 1", "tier 2", "tier 3", "easiest")
TIER_COLORS = ("#7a1f1f", "#d97b3f", "#e8d27a", "#7fb88a", "#2f6f5e")


@dataclass(frozen=True)
class Way:
    """How runs draw their prompts, and for how long. All of them draw about 35,000 rollouts of unanswerable prompts."""

    steps: int = 40
    interval: int = 4  # of validation
    keys: tuple[str, ...] = ()


GAIN = {"RLCS": Way()}
# Validated each 1,920 rollouts, about.
SAMPLING = {
    "RLCS": Way(interval=2),
    "uniform": Way(90, 5, ("curriculum.sampler=uniform", "expansion.enabled=false")),
}


@dataclass(frozen=True)
class Learned:
    """One run."""

    name: str
    rewards: list[float]  # of each iteration
    rollouts: list[int]  # drawn until the end of each iteration
    metrics: list[dict[str, Any]]  # of each iteration
    accuracy: list[tuple[int, float]]  # (iteration, greedy accuracy on held-out images)
    cpu_seconds: float

    @property
    def gain(self) -> float:
        """How much the reward of the last iterations is above that of the first."""
        return _mean(self.rewards[-AVERAGED:]) - _mean(self.rewards[:AVERAGED])

    @property
    def accuracy_gain(self) -> float:
        """The last greedy accuracy less the first."""
        return self.accuracy[-1][1] - self.accuracy[0][1]

    def smoothed(self) -> list[tuple[int, float]]:
        """Return (rollouts, mean accuracy of AVERAGED validations) from the second validation on."""
        values = [value for _, value in self.accuracy]
        steps = [step for step, _ in self.accuracy]
        return [
            (self.rollouts[steps[place] - 1], _mean(values[max(place - AVERAGED + 1, 1) : place + 1]))
            for place in range(1, len(values))
        ]


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("/tmp/glmv-benchmarks/learning"),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    unanswerable: Annotated[bool, typer.Option("--unanswerable", help="compare RLCS with uniform draws")] = False,
    plot: Annotated[Path | None, typer.Option(help="image file of the curves")] = None,
) -> None:
    """Train with several seeds, and print what was gained."""
    start = prepare(out)
    prompts, ways = ("half_unanswerable", SAMPLING) if unanswerable else ("prompts", GAIN)
    runs = {
        name: [learn(out, start, prompts, f"{name} seed {seed}", seed, way) for seed in range(seeds)]
        for name, way in ways.items()
    }
    for run in chain.from_iterable(runs.values()):
        first, last = run.accuracy[0][1], run.accuracy[-1][1]
        print(
            f"{run.name:16} {run.rollouts[-1]:7,} rollouts  reward {_mean(run.rewards[:AVERAGED]):.3f} -> "
            f"{_mean(run.rewards[-AVERAGED:]):.3f}  greedy {first:.3f} -> {last:.3f}  {run.cpu_seconds:.0f} CPU s"
        )
    print("\n".join(_saved(runs["RLCS"], runs["uniform"]) if unanswerable else _gained(runs["RLCS"])))
    if plot and unanswerable:
        draw_sampling(runs, plot)
    elif plot:
        draw_gain(runs["RLCS"], plot)


def prepare(out: Path) -> Path:
    """Build the shards and the start model, unless they are there; return the start model's run."""
    if not (out / "digits" / "shards" / "held_out").is_dir():
        build(out / "digits")
    start = out / "start"
    if not (start / "checkpoints" / "latest").is_file():
        keys = [f"data.sources=[{{path: {out}/digits/shards/chats}}]", f"train.output_dir={start}"]
        _train("pretrain.train", "rl_start", out, keys)
    return start


def learn(out: Path, start: Path, prompts: str, name: str, seed: int, way: Way) -> Learned:
    """Run `rl.train`, unless the run is there."""
    folder = out / f"{prompts} {name}".replace(" ", "_")
    if not (folder / DONE).is_file():
        before = _cpu_seconds()
        run_keys = [
            f"model.init_from={start}",
            f"data.sources=[{{path: {out}/digits/shards/{prompts}}}]",
            f"validation.sources=[{{path: {out}/digits/shards/held_out}}]",
            f"validation.interval={way.interval}",
            f"train.steps={way.steps}",
            f"train.seed={seed}",
            f"data.seed={seed}",
            f"train.output_dir={folder}",
            "rollout.keep_last=1",
            "checkpoint.save_interval=0",
        ]
        _train("rl.train", "rl", out, [*run_keys, *way.keys])
        write_json(folder / DONE, {"cpu_seconds": _cpu_seconds() - before})
    lines, validation = read_metrics(folder / "metrics.jsonl"), read_metrics(folder / "validation.jsonl")
    drawn = [int(line["rollouts"]) for line in lines]
    return Learned(
        name,
        [line["reward"] for line in lines],
        [sum(drawn[: place + 1]) for place in range(len(drawn))],
        lines,
        [(line["step"], line["validation/accuracy"]) for line in validation],
        json.loads((folder / DONE).read_text())["cpu_seconds"],
    )


def _train(entry: str, config: str, out: Path, keys: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", entry]
    command += ["--config", f"configs/tiny/{config}.yaml", f"data.tokenizer={out}/digits/tokenizer", *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{entry} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- what is printed --------------------------------------------------------------------------------------------------


def _gained(runs: Sequence[Learned]) -> list[str]:
    least, mean = min(run.gain for run in runs), _mean([run.accuracy_gain for run in runs])
    worst = min(run.accuracy_gain for run in runs)
    return [
        f"reward rises by at least {least:.3f} (limit {REWARD_GAIN}): {_met(least >= REWARD_GAIN)}",
        f"greedy accuracy changes by at least {worst:+.3f} (limit 0): {_met(worst >= 0)}",
        f"greedy accuracy rises by {mean:.3f} in the mean (limit {MEAN_ACCURACY_GAIN}): "
        f"{_met(mean >= MEAN_ACCURACY_GAIN)}",
    ]


def _saved(rlcs: Sequence[Learned], uniform: Sequence[Learned]) -> list[str]:
    shares = []
    for one, other in zip(rlcs, uniform, strict=True):
        needed, target = other.smoothed()[-1]
        reached = next((rollouts for rollouts, value in one.smoothed() if value >= target), None)
        shares.append(reached / needed if reached else float("inf"))
    median = statistics.median(shares)
    each = ", ".join(f"{share:.2f}" for share in shares)
    return [
        f"rollouts of RLCS until the accuracy at which uniform draws end, over theirs: {each}; median {median:.2f} "
        f"(limit {ROLLOUTS_SHARE}): {_met(median <= ROLLOUTS_SHARE)}"
    ]


def _met(value: bool) -> str:
    return "met" if value else "missed"


def draw_gain(runs: Sequence[Learned], path: Path) -> None:
    """Draw rewards and accuracies over the rollouts."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rewards, accuracies = figure.subplots(1, 2)
    for run, color in zip(runs, cycle(COLORS)):
        rewards.plot([count / 1000 for count in run.rollouts], run.rewards, label=run.name, color=color, linewidth=1.4)
        _plot_accuracy(accuracies, run, color, "-")
    _label(rewards, "reward of the rollouts", "1,000 rollouts")
    _label(accuracies, "greedy accuracy, held out", "1,000 rollouts")
    rewards.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_sampling(runs: Mapping[str, Sequence[Learned]], path: Path) -> None:
    """Draw the accuracies of all runs, and what the curriculum of the first RLCS run drew in each iteration."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    accuracies, tiers, expansion = figure.subplots(1, 3)
    for way, style in (("RLCS", "-"), ("uniform", "--")):
        for run, color in zip(runs[way], cycle(COLORS)):
            _plot_accuracy(accuracies, run, color, style, run.name)
    _label(accuracies, "greedy accuracy, held out", "1,000 rollouts")
    accuracies.legend(frameon=False, fontsize=8)

    lines = runs["RLCS"][0].metrics
    iterations = [line["step"] for line in lines]
    shares = [[line[f"curriculum/weight/tier_{tier}"] for line in lines] for tier in range(len(TIERS))]
    tiers.stackplot(iterations, shares, labels=TIERS, colors=TIER_COLORS)
    tiers.set(xlim=(iterations[0], iterations[-1]), ylim=(0, 1))
    tiers.legend(loc="lower right", fontsize=8)
    _label(tiers, f"share of the draw by tier, {runs['RLCS'][0].name}", "iteration")

    expansion.plot(iterations, [line["expansion/ratio"] for line in lines], label="prompts drawn per prompt wanted")
    for way, style in (("RLCS", "-"), ("uniform", "--")):
        shown = runs[way][0].metrics[: len(lines)]
        valid = [line["groups/valid_share"] for line in shown]
        expansion.plot(iterations, valid, color=COLORS[2], linestyle=style, label=f"share of valid groups, {way}")
    expansion.set(xlim=(iterations[0], iterations[-1]), ylim=(0, None))
    expansion.legend(frameon=False, fontsize=8)
    _label(expansion, "expansion, seed 0", "iteration")
    figure.savefig(path, dpi=110)


def _plot_accuracy(axes: Axes, run: Learned, color: str, style: str, label: str | None = None) -> None:
    places = [0.0, *(run.rollouts[step - 1] / 1000 for step, _ in run.accuracy[1:])]
    values = [value for _, value in run.accuracy]
    axes.plot(places, values, color=color, linestyle=style, linewidth=1.4, marker="o", markersize=3, label=label)


def _label(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.grid(axis="y", color="#e2e8f0")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    typer.run(main)
