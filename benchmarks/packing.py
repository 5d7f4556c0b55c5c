"""How full and how even the planned packs are, and how fast they are planned, on one core.

    python -m benchmarks.packing

60,000 made-up samples: 45 % captions, 15 % interleaved documents, 20 % pages to read, 12 % screenshots to point at, 8 %
clips, their pictures sized by the data pipeline's own rule. Costs are GLM-4.5V's, from `model.flops`; the data-parallel
ranks meet in every micro-step, so what counts is the costliest rank's pack over the mean of all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from benchmarks.drawn_sources import Drawn, DrawnSource, frame_pairs, page, photo, screenshot
from data_pipeline.plan.pack_cost import PackCost
from data_pipeline.plan.plan import Plan, Position
from model.config import GlmvConfig
from training.pack_cost import pack_cost

SAMPLES = 60_000
RANKS = 64
SEQ_LENGTHS = (8192, 32768)
STEPS = {64: 128, 128: 64, 1024: 12, 1536: 8}  # by packs of a step
AIMED_AT = {"mean": 2211, "median": 1578, "99 %": 9489, "longest": 31231}  # of the samples, in tokens


def caption(rng: np.random.Generator) -> Drawn:
    return [photo(rng, 0.77, 0.6)], int(rng.integers(20, 250))


def interleaved(rng: np.random.Generator) -> Drawn:
    return [photo(rng, 0.43, 0.7) for _ in range(rng.integers(1, 9))], int(rng.integers(200, 1800))


def ocr(rng: np.random.Generator) -> Drawn:
    return [page(rng)], int(rng.integers(100, 1200))


def grounding(rng: np.random.Generator) -> Drawn:
    return [screenshot(rng)], int(rng.integers(40, 400))


def video(rng: np.random.Generator) -> Drawn:
    """Frame pairs at two frames a second, each followed by its time."""
    height, width = ((360, 640), (480, 854), (640, 360), (272, 480))[rng.integers(4)]
    pairs = max(1, min(int(9.4 * rng.lognormal(sigma=0.84)), 170))
    return frame_pairs(height, width, pairs), int(rng.integers(40, 900)) + 3 * pairs


KINDS: dict[str, tuple[Callable[[np.random.Generator], Drawn], float]] = {
    "caption": (caption, 0.45),
    "interleaved": (interleaved, 0.15),
    "ocr": (ocr, 0.20),
    "grounding": (grounding, 0.12),
    "video": (video, 0.08),
}


def draw_sources(samples: int = SAMPLES, seed: int = 0) -> list[DrawnSource]:
    """A source of each kind. Weights are shares of tokens, such that all samples come equally often."""
    sources = []
    for place, (label, (draw, share)) in enumerate(KINDS.items()):
        rng = np.random.default_rng([seed, place])
        source = DrawnSource.draw(label, partial(draw, rng), round(samples * share))
        source.weight = float(source.lengths.sum())
        sources.append(source)
    return sources


def within(sources: list[DrawnSource], seq_length: int) -> list[DrawnSource]:
    """The sources with weights by which what fits a sequence comes as often as it is there."""
    return [replace(source, weight=float(source.lengths[source.lengths <= seq_length].sum())) for source in sources]


@dataclass
class Planned:
    """The packs of a few steps in columns: of every piece its step, its pack in the step, and what it amounts to."""

    step: np.ndarray
    pack: np.ndarray
    length: np.ndarray
    patches: np.ndarray
    cost: np.ndarray
    seconds: float  # of this process, all of planning
    first: float  # until the first step


def planned(sources: list[DrawnSource], seq_length: int, packs_a_step: int, steps: int, cost: PackCost) -> Planned:
    begin = time.process_time()
    plan = Plan(sources, seed=0, seq_length=seq_length, segment_multiple=8, global_batch_size=packs_a_step, cost=cost)
    stream = plan.steps(Position.start(len(sources)))
    seconds, taken = [], []
    for number in range(steps):
        packs, _ = next(stream)
        seconds.append(time.process_time() - begin)
        taken.append(
            np.array([(number, place, *piece) for place, pack in enumerate(packs) for piece in pack.pieces], np.int64)
        )
        begin = time.process_time()
    step, pack, source, row, _, length = np.concatenate(taken).T
    patches, squared = np.empty(len(row)), np.empty(len(row))
    for place, of in enumerate(sources):
        patches[source == place] = of.patches[row[source == place]]
        squared[source == place] = of.patches_squared[row[source == place]]
    return Planned(step, pack, length, patches, cost.of(length, patches, squared), sum(seconds), seconds[0])


def unevenness(step: np.ndarray, pack: np.ndarray, amounts: np.ndarray, packs_a_step: int, ranks: int) -> np.ndarray:
    """[micro-steps]: most over mean of the packs that the ranks work on at the same time."""
    sums = np.bincount(step * packs_a_step + pack, amounts, (step.max() + 1) * packs_a_step).reshape(-1, ranks)
    return sums.max(1) / sums.mean(1)


def bound(amounts: np.ndarray, lengths: np.ndarray, seq_length: int, packs: int, ranks: int) -> float:
    """What the mean of `unevenness` over a step cannot be below, however its pieces are packed.

    The micro-step with the piece that amounts to most has a pack of at least that much; all of its packs together have
    no more than `ranks` sequences cut out of the densest pieces would have. The others may be perfectly even.
    """
    densest = np.argsort(-amounts / lengths)
    filled = np.minimum(np.cumsum(lengths[densest]), ranks * seq_length)
    most = (np.diff(filled, prepend=0) / lengths[densest] * amounts[densest]).sum()
    return 1 + max(amounts.max() * ranks / most - 1, 0) * ranks / packs


def main() -> None:
    cost = pack_cost(GlmvConfig.from_preset("glm45v"))
    print(
        f"forward FLOPs: {cost.token / 1e9:.1f} G a token, {cost.token_squared / 1e6:.2f} M x tokens of a segment "
        f"squared, {cost.patch / 1e9:.2f} G a patch, {cost.patch_squared / 1e6:.3f} M x patches of an image squared"
    )
    sources = draw_sources()
    gc.freeze()  # a real source is a few arrays, nothing for the garbage collector to walk through
    lengths = np.concatenate([source.lengths for source in sources])
    figures = lengths.mean(), np.median(lengths), np.quantile(lengths, 0.99), lengths.max()
    for (name, aim), value in zip(AIMED_AT.items(), figures, strict=True):
        print(f"tokens of a sample, {name}: {value:,.0f} (aimed at {aim:,})")
    for seq_length in SEQ_LENGTHS:
        aside = (lengths > seq_length).mean()
        print(f"\n{seq_length} tokens, {RANKS} ranks; {aside:.2%} of the samples are longer and set aside")
        print(f"{'':>31}{'most / mean of a micro-step: cost':>40}{'patches':>24}{'in any order':>18}")
        print(
            f"{'packs':>6}{'fill %':>8}{'first s':>8}{'samples/s':>11}"
            + f"{'mean':>12}{'worst':>7}{'bound':>7}" * 2
            + f"{'cost':>10}{'patches':>9}"
        )
        for packs_a_step, steps in STEPS.items():
            print(_row(within(sources, seq_length), seq_length, packs_a_step, steps, cost))


def _row(sources: list[DrawnSource], seq_length: int, packs_a_step: int, steps: int, cost: PackCost) -> str:
    """Speed is the best of three, for what else a machine does."""
    runs = [planned(sources, seq_length, packs_a_step, steps, cost) for _ in range(3)]
    of, speed = runs[0], max(len(run.length) / run.seconds for run in runs)
    fill = of.length.sum() / (steps * packs_a_step * seq_length)
    row = f"{packs_a_step:>6}{100 * fill:>8.2f}{min(run.first for run in runs):>8.3f}{speed:>11,.0f}"
    for amounts in (of.cost, of.patches):
        uneven = unevenness(of.step, of.pack, amounts, packs_a_step, RANKS)
        bounds = [
            bound(amounts[of.step == step], of.length[of.step == step], seq_length, packs_a_step, RANKS)
            for step in range(steps)
        ]
        row += f"{uneven.mean():>12.4f}{uneven.max():>7.3f}{np.mean(bounds):>7.3f}"
    shuffled = np.random.default_rng(0).permutation(packs_a_step)[of.pack]
    anyhow = [unevenness(of.step, shuffled, amounts, packs_a_step, RANKS).mean() for amounts in (of.cost, of.patches)]
    return row + f"{anyhow[0]:>10.3f}{anyhow[1]:>9.3f}"


if __name__ == "__main__":
    main()
