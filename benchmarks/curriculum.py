"""What curriculum sampling and expansion do for a simulated learner. No model is trained: it takes seconds.

    python -m benchmarks.curriculum

The learner is one number, its ability: it answers a prompt right with the probability 1 / (1 + exp(difficulty -
ability)). Difficulties are normal, with a standard deviation of `spread`, a quarter of whose square lies between kinds.
An iteration draws prompts with the real curriculum, rolls out groups of 8, keeps the most even ones as training does,
and adds RATE times the sum of their standard deviations over PROMPTS to the ability. That is GRPO's gradient with
respect to the ability: the mean over a group of advantage * (reward - probability) is the group's standard deviation.

The figure of a run is the number of rollouts after which the mean probability over all prompts reaches TARGET. In a
second set half of the prompts can never be answered right, which do not count in the mean: as prompts like the others,
as a category of their own, or as a source of their own. Prints tables and draws docs/images/curriculum.png.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from rl.curriculum.config import CurriculumConfig
from rl.curriculum.curriculum import Curriculum
from rl.curriculum.facts import PromptFacts
from rl.curriculum.rates import count_passes
from rl.expansion import Expansion, ExpansionConfig
from rl.selection import have_differences, select_groups

PROMPTS, GROUP = 64, 8  # groups that an iteration trains on, and samples in each
KINDS = 8  # among the prompts
RATE = 0.1
START, TARGET = 0.35, 0.6  # mean probability of a right answer, before and at the end
GRADES = 8  # rollouts of the offline grades
MOST_ITERATIONS = 1000
SEEDS = range(5)
SPREADS = (4.0, 8.0)
SETS = (1000, 4000)  # prompts of a set
UNANSWERABLE = ("among the others", "own category", "own source")  # where prompts are that nobody can answer
MANY = 1_000_000  # prompts for the timing
FIGURE = Path("docs/images/curriculum.png")

# Name of a way to sample -> (curriculum.sampler, with expansion, with offline grades)
WAYS = {
    "uniform": ("uniform", False, False),
    "RLCS": ("rlcs", False, False),
    "RLCS, graded before": ("rlcs", False, True),
    "uniform with expansion": ("uniform", True, False),
    "RLCS with expansion": ("rlcs", True, False),
}


@dataclass
class History:
    """One simulated run, a value per iteration."""

    rollouts: list[int] = field(default_factory=list)  # so far
    right: list[float] = field(default_factory=list)  # mean probability of a right answer over all prompts
    valid: list[float] = field(default_factory=list)  # share of the groups that have differences
    kept: list[int] = field(default_factory=list)  # groups trained on
    expansion: list[float] = field(default_factory=list)  # of the draw
    reports: list[dict[str, float]] = field(default_factory=list)  # of the curriculum


class Learner:
    """One ability, and prompts of many difficulties.

    Args:
        spread: standard deviation of the difficulties.
        seed: of the difficulties and of the answers.
        prompts: how many.
        unanswerable: one of UNANSWERABLE: so half of the prompts are; empty: none is.
    """

    def __init__(self, spread: float, seed: int, prompts: int, unanswerable: str = "") -> None:
        self.rng = np.random.default_rng(seed)
        self.kinds = self.rng.integers(0, KINDS, prompts)
        of_kinds = self.rng.normal(0, spread / 2, KINDS)
        self.difficulties = of_kinds[self.kinds] + self.rng.normal(0, spread * 0.75**0.5, prompts)
        self.sources = [0] * KINDS
        if unanswerable:
            is_one = self.rng.random(prompts) < 0.5
            self.difficulties[is_one] = np.inf
            if unanswerable != "among the others":
                self.kinds[is_one] = KINDS
                self.sources.append(int(unanswerable == "own source"))
        self.ability = self._ability_at(START)

    def probabilities(self) -> np.ndarray:
        """Return the probability of a right answer to each prompt, float64 [prompts]."""
        return 1 / (1 + np.exp(self.difficulties - self.ability))

    def right(self) -> float:
        """Return the mean probability of a right answer over the prompts that have one."""
        return float(self.probabilities()[np.isfinite(self.difficulties)].mean())

    def answers(self, rows: np.ndarray) -> np.ndarray:
        """Return rewards of 0 and 1, float64 [groups, GROUP]."""
        return (self.rng.random((len(rows), GROUP)) < self.probabilities()[rows, None]).astype(np.float64)

    def train(self, scores: np.ndarray) -> None:
        """Learn from groups, rewards [groups, GROUP]."""
        self.ability += RATE * scores.std(axis=1).sum() / PROMPTS

    def facts(self, *, graded: bool) -> PromptFacts:
        """Return the prompts for the curriculum, with the learner's own pass@k at the start as grades, or without."""
        count = len(self.kinds)
        passes = self.rng.binomial(GRADES, self.probabilities()) if graded else np.zeros(count)
        return PromptFacts(
            ids=[str(row) for row in range(count)],
            kinds=self.kinds,
            kind_names=[f"{source}/{kind}" for kind, source in enumerate(self.sources)],
            kind_sources=self.sources,
            source_weights=[1.0] * (max(self.sources) + 1),
            tiers=np.full(count, -1),
            passes=passes,
            rollouts=np.full(count, GRADES if graded else 0),
        )

    def _ability_at(self, right: float) -> float:
        low, high = -50.0, 50.0
        for _ in range(60):
            self.ability = (low + high) / 2
            low, high = (self.ability, high) if self.right() < right else (low, self.ability)
        return low


def simulate(way: str, spread: float, seed: int, prompts: int = SETS[0], unanswerable: str = "") -> History:
    """Return the run of a learner until it reaches TARGET."""
    sampler, expand, graded = WAYS[way]
    learner = Learner(spread, seed, prompts, unanswerable)
    config = CurriculumConfig(sampler=sampler)
    curriculum = Curriculum(config, learner.facts(graded=graded), seed)
    expansion, history = Expansion(ExpansionConfig(enabled=expand)), History()
    for iteration in range(MOST_ITERATIONS):
        history.expansion.append(expansion.ratio)
        rows = curriculum.draw(iteration, expansion.count(PROMPTS))
        history.reports.append(curriculum.report())
        scores = learner.answers(rows)
        kept = select_groups(scores, PROMPTS)
        curriculum.observe(rows, count_passes(scores, config.pass_score), np.full(len(rows), GROUP))
        expansion.observe(float(have_differences(scores).mean()))
        learner.train(scores[kept])
        history.rollouts.append(sum(history.rollouts[-1:]) + scores.size)
        history.right.append(learner.right())
        history.valid.append(float(have_differences(scores).mean()))
        history.kept.append(len(kept))
        if history.right[-1] >= TARGET:
            break
    return history


def rollouts_to_target(way: str, spread: float, prompts: int = SETS[0], unanswerable: str = "") -> float:
    """Return the rollouts that the learner needs, median of SEEDS."""
    return median(simulate(way, spread, seed, prompts, unanswerable).rollouts[-1] for seed in SEEDS)


# --- valid groups where fewer and fewer are ---------------------------------------------------------------------------


def falling(shape: str, iterations: int) -> np.ndarray:
    """Return the probability that a group is valid in each iteration, falling from 0.8 to 0.3."""
    done = np.linspace(0, 1, iterations)
    fallen = {
        "line": done,
        "curve": 1 / (1 + np.exp(-12 * (done - 0.5))),
        "step": (done >= 0.5).astype(float),
    }[shape]
    return 0.8 - 0.5 * fallen


def kept_groups(shape: str, *, expand: bool, seed: int, iterations: int = 100, prompts: int = 128) -> np.ndarray:
    """Return the number of groups trained on in each iteration, int64 [iterations], where the valid share falls."""
    rng, expansion = np.random.default_rng(seed), Expansion(ExpansionConfig(enabled=expand))
    kept = []
    for share in falling(shape, iterations):
        is_valid = rng.random(expansion.count(prompts)) < share
        scores = np.where(is_valid[:, None], [0.0, 1.0], 1.0)
        expansion.observe(float(have_differences(scores).mean()))
        kept.append(len(select_groups(scores, prompts)))
    return np.array(kept)


# --- the page ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Simulate every way to sample, print the tables and draw the figure."""
    console = Console()
    show(
        console, {f"{count:,} prompts, spread {spread:g}": (spread, count, "") for count in SETS for spread in SPREADS}
    )
    show(console, {f"half unanswerable, {where}": (2.0, 2000, where) for where in UNANSWERABLE})
    table = Table("valid share falls from 0.8 to 0.3 as a", "groups trained on: deviation / mean, with", "without")
    for shape in ("line", "curve", "step"):
        groups = [kept_groups(shape, expand=expand, seed=0) for expand in (True, False)]
        table.add_row(shape, *(f"{one.std() / one.mean():.2f}" for one in groups))
    console.print(table)
    console.print(f"{MANY:,} prompts: {seconds_of_an_iteration(512) * 1000:.0f} CPU-ms to draw and observe 512")
    draw(simulate("RLCS with expansion", 8.0, 0), {way: simulate(way, 8.0, 0) for way in WAYS})


def show(console: Console, cases: dict[str, tuple[float, int, str]]) -> None:
    """Print the rollouts that each way needs, and over those of uniform draws. A case is (spread, prompts, ...)."""
    table = Table("rollouts to the target", *cases)
    uniform = [rollouts_to_target("uniform", *case) for case in cases.values()]
    for way in WAYS:
        found = [rollouts_to_target(way, *case) for case in cases.values()]
        table.add_row(way, *(f"{one:,.0f} ({one / all_of:.2f})" for one, all_of in zip(found, uniform, strict=True)))
    console.print(table)


def seconds_of_an_iteration(count: int) -> float:
    """Return the CPU seconds in which `count` of MANY prompts are drawn and observed, median of 9."""
    learner = Learner(SPREADS[0], 0, MANY)
    curriculum, times = Curriculum(CurriculumConfig(), learner.facts(graded=True), 0), []
    for iteration in range(9):
        began = time.process_time()
        rows = curriculum.draw(iteration, count)
        curriculum.observe(rows, np.full(count, GROUP // 2), np.full(count, GROUP))
        times.append(time.process_time() - began)
    return median(times)


def draw(run: History, runs: dict[str, History]) -> None:
    """Draw the shares of tiers and the expansion of one run, and the progress of all ways, into FIGURE."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    tiers = len(CurriculumConfig().weights)
    shares = [[report[f"curriculum/weight/tier_{tier}"] for report in run.reports] for tier in range(tiers)]
    iterations = range(len(run.reports))
    colors = ["#7a1f1f", "#d97b3f", "#e8d27a", "#7fb88a", "#2f6f5e"]
    names = ["hardest", *(f"tier {tier}" for tier in range(1, tiers - 1)), "easiest"]
    left.stackplot(iterations, shares, labels=names, colors=colors)
    left.set(title="share of the draw by tier", xlabel="iteration", xlim=(0, len(iterations) - 1), ylim=(0, 1))
    left.legend(loc="lower right", fontsize=8)
    middle.plot(iterations, run.expansion, label="prompts drawn per prompt trained on")
    middle.plot(iterations, run.valid, label="share of valid groups")
    middle.plot(iterations, np.array(run.kept) / PROMPTS, label="groups trained on / wanted")
    middle.set(title="expansion", xlabel="iteration", xlim=(0, len(iterations) - 1), ylim=(0, None))
    middle.legend(loc="upper right", fontsize=8)
    for way, one in runs.items():
        right.plot(np.array(one.rollouts) / 1000, one.right, label=way)
    right.set(title="progress, spread 8", xlabel="1,000 rollouts", ylabel="mean probability of a right answer")
    right.legend(fontsize=8)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
