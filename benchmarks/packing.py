"""How full and how balanced the planned packs are, and how fast they are planned, on one core.

    python -m benchmarks.packing

60,000 synthetic samples: 45% captions, 15% interleaved documents, 20% OCR pages, 12% screenshots for grounding, 8%
videos; their images are resized by the data pipeline's rule. Costs are those of GLM-4.5V, from `model.flops`. The
data-parallel ranks wait for each other in every micro-step, so imbalance is the largest over the mean of their packs.
The limit is a lower bound for every packing and order (`bound`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from benchmarks.synthetic_sources import SampleSize, SyntheticSource, frame_pairs, page, photo, screenshot
from data_pipeline.plan.pack_cost import PackCost
from data_pipeline.plan.plan import Plan, PlanPosition
from model.config import GlmvConfig
from training.pack_cost import pack_cost

SAMPLES = 60_000
RANKS = 64
SEQ_LENGTHS = (8192, 32768)
STEPS = {64: 128, 128: 64, 1024: 12, 1536: 8}  # by packs per step
TARGETS = {"mean": 2211, "median": 1578, "99%": 9489, "longest": 31231}  # tokens per sample of a realistic mixture


def caption(rng: np.random.Generator) -> SampleSize:
    """Return one image with a caption."""
    return [photo(rng, 0.77, 0.6)], int(rng.integers(20, 250))


def interleaved(rng: np.random.Generator) -> SampleSize:
    """Return a document with 1 to 8 images."""
    return [photo(rng, 0.43, 0.7) for _ in range(rng.integers(1, 9))], int(rng.integers(200, 1800))


def ocr(rng: np.random.Generator) -> SampleSize:
    """Return a page with its text."""
    return [page(rng)], int(rng.integers(100, 1200))


def grounding(rng: np.random.Generator) -> SampleSize:
    """Return a screenshot with a question about it."""
    return [screenshot(rng)], int(rng.integers(40, 400))


def video(rng: np.random.Generator) -> SampleSize:
    """Return frame pairs at two frames per second, each followed by its timestamp."""
    height, width = ((360, 640), (480, 854), (640, 360), (272, 480))[rng.integers(4)]
    pairs = max(1, min(int(9.4 * rng.lognormal(sigma=0.84)), 170))
    return frame_pairs(height, width, pairs), int(rng.integers(40, 900)) + 3 * pairs


KINDS: dict[str, tuple[Callable[[np.random.Generator], SampleSize], float]] = {
    "caption": (caption, 0.45),
    "interleaved": (interleaved, 0.15),
    "ocr": (ocr, 0.20),
    "grounding": (grounding, 0.12),
    "video": (video, 0.08),
}


def make_sources(samples: int = SAMPLES, seed: int = 0) -> list[SyntheticSource]:
    """Return a source of each kind, with weights by which all samples come equally often."""
    sources = []
    for number, (label, (make, share)) in enumerate(KINDS.items()):
        rng = np.random.default_rng([seed, number])
        source = SyntheticSource.generate(label, partial(make, rng), round(samples * share))
        source.weight = float(source.lengths.sum())
        sources.append(source)
    return sources


def reweighted(sources: list[SyntheticSource], seq_length: int) -> list[SyntheticSource]:
    """Return the sources with weights by which all samples that fit a sequence come equally often."""
    return [replace(source, weight=float(source.lengths[source.lengths <= seq_length].sum())) for source in sources]


@dataclass
class Planned:
    """The pieces of a few steps, in columns, and how long planning took."""

    step: np.ndarray  # int64 [pieces]
    pack: np.ndarray  # int64 [pieces], in the step
    length: np.ndarray  # int64 [pieces], tokens
    patches: np.ndarray  # float64 [pieces]
    cost: np.ndarray  # float64 [pieces], operations
    seconds: float  # CPU time of all steps
    first: float  # CPU time of the first step


def planned(
    sources: list[SyntheticSource], seq_length: int, packs_per_step: int, steps: int, cost: PackCost
) -> Planned:
    """Plan a few steps."""
    begin = time.process_time()
    plan = Plan(sources, seed=0, seq_length=seq_length, segment_multiple=8, global_batch_size=packs_per_step, cost=cost)
    stream = plan.steps(PlanPosition.start(len(sources)))
    seconds, taken = [], []
    for number in range(steps):
        packs, _ = next(stream)
        seconds.append(time.process_time() - begin)
        taken.append(
            np.array([(number, index, *piece) for index, pack in enumerate(packs) for piece in pack.pieces], np.int64)
        )
        begin = time.process_time()
    step, pack, source, row, _, length = np.concatenate(taken).T
    patches, squared = np.empty(len(row)), np.empty(len(row))
    for index, table in enumerate(sources):
        patches[source == index] = table.patches[row[source == index]]
        squared[source == index] = table.patches_squared[row[source == index]]
    return Planned(step, pack, length, patches, cost.of(length, patches, squared), sum(seconds), seconds[0])


def imbalance(step: np.ndarray, pack: np.ndarray, amounts: np.ndarray, packs_per_step: int, ranks: int) -> np.ndarray:
    """Return float64 [micro-steps]: largest over mean of the packs that the ranks process at the same time."""
    sums = np.bincount(step * packs_per_step + pack, amounts, (step.max() + 1) * packs_per_step).reshape(-1, ranks)
    return sums.max(1) / sums.mean(1)


def bound(amounts: np.ndarray, lengths: np.ndarray, seq_length: int, packs: int, ranks: int) -> float:
    """Return a lower bound for the mean of `imbalance` over a step, however its pieces are packed.

    The micro-step with the largest piece has a pack of at least that amount; all of its packs together have at most
    what `ranks` sequences cut out of the densest pieces would have. The other micro-steps may be perfectly balanced.
    """
    densest = np.argsort(-amounts / lengths)
    filled = np.minimum(np.cumsum(lengths[densest]), ranks * seq_length)
    most = (np.diff(filled, prepend=0) / lengths[densest] * amounts[densest]).sum()
    return 1 + max(amounts.max() * ranks / most - 1, 0) * ranks / packs


def main() -> None:
    """Print a table for each sequence length."""
    cost = pack_cost(GlmvConfig.from_preset("glm45v"))
    print(
        f"forward FLOPs: {cost.token / 1e9:.1f} G per token, {cost.token_squared / 1e6:.2f} M x tokens of a segment "
        f"squared, {cost.patch / 1e9:.2f} G per patch, {cost.patch_squared / 1e6:.3f} M x patches of an image squared"
    )
    sources = make_sources()
    gc.freeze()  # a real source is a few arrays, which cost the garbage collector nothing
    lengths = np.concatenate([source.lengths for source in sources])
    figures = lengths.mean(), np.median(lengths), np.quantile(lengths, 0.99), lengths.max()
    for (name, target), value in zip(TARGETS.items(), figures, strict=True):
        print(f"tokens per sample, {name}: {value:,.0f} (target {target:,})")
    for seq_length in SEQ_LENGTHS:
        too_long = (lengths > seq_length).mean()
        print(f"\n{seq_length} tokens, {RANKS} ranks; {too_long:.2%} of the samples are too long")
        print(f"{'':>31}{'largest / mean of a micro-step: cost':>40}{'patches':>24}{'random order':>18}")
        print(
            f"{'packs':>6}{'fill %':>8}{'first s':>8}{'samples/s':>11}"
            + f"{'mean':>12}{'worst':>7}{'bound':>7}" * 2
            + f"{'cost':>10}{'patches':>9}"
        )
        for packs_per_step, steps in STEPS.items():
            print(_row(reweighted(sources, seq_length), seq_length, packs_per_step, steps, cost))


def _row(sources: list[SyntheticSource], seq_length: int, packs_per_step: int, steps: int, cost: PackCost) -> str:
    """Return a line of the table. The speed is the best of three runs, because other programs may use the machine."""
    runs = [planned(sources, seq_length, packs_per_step, steps, cost) for _ in range(3)]
    plan, speed = runs[0], max(len(run.length) / run.seconds for run in runs)
    fill = plan.length.sum() / (steps * packs_per_step * seq_length)
    row = f"{packs_per_step:>6}{100 * fill:>8.2f}{min(run.first for run in runs):>8.3f}{speed:>11,.0f}"
    for amounts in (plan.cost, plan.patches):
        ratios = imbalance(plan.step, plan.pack, amounts, packs_per_step, RANKS)
        bounds = [
            bound(amounts[plan.step == step], plan.length[plan.step == step], seq_length, packs_per_step, RANKS)
            for step in range(steps)
        ]
        row += f"{ratios.mean():>12.4f}{ratios.max():>7.3f}{np.mean(bounds):>7.3f}"
    shuffled = np.random.default_rng(0).permutation(packs_per_step)[plan.pack]
    for amounts, width in ((plan.cost, 10), (plan.patches, 9)):
        row += f"{imbalance(plan.step, shuffled, amounts, packs_per_step, RANKS).mean():>{width}.3f}"
    return row


if __name__ == "__main__":
    main()
