"""How evenly several rules divide the images of a pack over four ranks.

    python -m benchmarks.image_balance

The packs are planned by the data pipeline (blended by tokens, best fit) over images and videos of realistic random
sizes, resized by the data pipeline's rule. Costs are those of GLM-4.5V, from `model.flops`; only the split itself is
timed. The limit is an equal share for every rank, or the cost of the largest image, which cannot be divided.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from benchmarks.synthetic_sources import Grid, SyntheticSource, frame_pairs, page, photo, screenshot
from data_pipeline.plan.plan import Pack, Plan, PlanPosition
from model.config import GlmvConfig, VisionConfig
from model.flops import image_cost
from model.image_assignment import Assignment, assign_images
from training.pack_cost import pack_cost

RANKS = 4
STEPS = 50
PACKS_PER_STEP = 48  # of one data-parallel rank: the 1,536 of the GLM-4.5V report over 32 ranks
WEB = (0.45, 0.7)  # median megapixels of images on the web, and their spread

# --- packs of synthetic samples ---------------------------------------------------------------------------------------


def video(rng: np.random.Generator) -> list[Grid]:
    """Return the frame pairs of 2 to 60 seconds of video at two frames per second."""
    size = ((360, 640), (480, 854), (720, 1280), (1280, 720))[rng.integers(4)]
    return frame_pairs(*size, int(rng.integers(2, 61)))


# A sample of each source: its images, and the minimum and maximum of text tokens.
SAMPLES: dict[str, tuple[Callable[[np.random.Generator], list[Grid]], int, int]] = {
    "captions": (lambda rng: [photo(rng, *WEB)], 20, 200),
    "interleaved": (lambda rng: [photo(rng, *WEB) for _ in range(rng.integers(2, 9))], 300, 2000),
    "pages": (lambda rng: [page(rng)], 200, 1200),
    "screenshots": (lambda rng: [screenshot(rng)], 50, 400),
    "text": (lambda rng: [], 200, 4000),
    "clips": (video, 100, 600),  # short videos; the label is part of the seed
}
MIXTURES = {  # weights; the GLM-4.5V report uses videos only in the long-context stage
    8192: {"captions": 3.0, "interleaved": 2.0, "pages": 2.0, "screenshots": 1.0, "text": 1.0},
    32768: {"captions": 2.0, "interleaved": 2.0, "pages": 2.0, "screenshots": 1.0, "text": 1.0, "clips": 2.0},
}


def synthetic_source(label: str, weight: float, seq_length: int, count: int = 2000) -> SyntheticSource:
    """Return a source of samples that fit a pack."""
    rng = np.random.default_rng([sum(label.encode()), seq_length])
    images_of, least, most = SAMPLES[label]
    return SyntheticSource.generate(
        label, lambda: (images_of(rng), int(rng.integers(least, most))), count, weight=weight, longest=seq_length
    )


def steps(seq_length: int, packs_per_step: int, seed: int = 0) -> Iterator[list[list[Grid]]]:
    """Yield, for step after step, the images of each of its packs. Endless."""
    sources = [synthetic_source(label, weight, seq_length) for label, weight in MIXTURES[seq_length].items()]
    plan = Plan(
        sources,
        seed=seed,
        seq_length=seq_length,
        segment_multiple=8,
        global_batch_size=packs_per_step,
        cost=pack_cost(GlmvConfig.from_preset("glm45v")),
    )

    def images_of(pack: Pack) -> list[Grid]:
        return [grid for piece in pack.pieces for grid in sources[piece.source].images[piece.row]]

    for packs, _ in plan.steps(PlanPosition.start(len(sources))):
        yield [images_of(pack) for pack in packs]


# --- rules ------------------------------------------------------------------------------------------------------------


def round_robin(costs: Sequence[int], ranks: int) -> Assignment:
    """Give image i to rank i modulo the number of ranks."""
    return [list(range(rank, len(costs), ranks)) for rank in range(ranks)]


def contiguous(costs: Sequence[int], ranks: int) -> Assignment:
    """Give each rank the same number of consecutive images."""
    return [share.tolist() for share in np.array_split(np.arange(len(costs)), ranks)]


def replicate(costs: Sequence[int], ranks: int) -> Assignment:
    """Give every rank all images."""
    return [list(range(len(costs)))] * ranks


RULES: dict[str, Callable[[Sequence[int], int], Assignment]] = {
    "glmv-train": assign_images,
    "round robin": round_robin,
    "equal numbers, consecutive": contiguous,
    "all images on every rank, as ms-swift": replicate,
}


def slowest(costs: Sequence[int], shares: Assignment) -> int:
    """Return the cost of the rank with the most work."""
    return max(sum(costs[image] for image in share) for share in shares)


def aim(costs: Sequence[int], ranks: int) -> float:
    """Return the larger of an equal share and the largest image, which cannot be divided."""
    return max(sum(costs) / ranks, max(costs))


def lower_bound(costs: Sequence[int], ranks: int) -> float:
    """Return a cost that the slowest rank of no split can be below.

    Of the k * ranks + 1 costliest images, some rank has at least k + 1, which cost no less than the cheapest k + 1 of
    them.
    """
    falling = sorted(costs, reverse=True)
    crowded = [sum(falling[k * ranks - k : k * ranks + 1]) for k in range(1, (len(costs) - 1) // ranks + 1)]
    return max(aim(costs, ranks), *crowded, 0)


def main() -> None:
    """Print the table."""
    vision = GlmvConfig.from_preset("glm45v").vision
    for seq_length in MIXTURES:
        per_step = [step_costs(vision, packs) for packs in islice(steps(seq_length, PACKS_PER_STEP), STEPS)]
        images = sum(len(costs) for step in per_step for costs in step) / (STEPS * PACKS_PER_STEP)
        print(
            f"\n{seq_length} tokens: {STEPS} steps of {PACKS_PER_STEP} packs, {images:.1f} images per pack, "
            f"{RANKS} ranks"
        )
        print(f"{'slowest rank over max(mean, largest image)':<44}{'all':>9}{'worst step':>12}{'worst pack':>12}")
        for rule, split in RULES.items():
            _print_row(rule, [[slowest(costs, split(costs, RANKS)) for costs in step] for step in per_step], per_step)
        bounds = [[lower_bound(costs, RANKS) for costs in step] for step in per_step]
        _print_row("lower bound for splits of whole images", bounds, per_step)
        begin = time.process_time()
        for step in per_step:
            for costs in step:
                assign_images(costs, RANKS)
        print(f"this split takes {1e3 * (time.process_time() - begin) / (STEPS * PACKS_PER_STEP):.2f} ms per pack")


def step_costs(vision: VisionConfig, packs: list[list[Grid]]) -> list[list[int]]:
    """Return the costs of the images of each pack that has images."""
    return [[image_cost(vision, h, w) for h, w in grids] for grids in packs if grids]


def _print_row(rule: str, times: Sequence[Sequence[float]], per_step: Sequence[Sequence[Sequence[int]]]) -> None:
    aims = [[aim(costs, RANKS) for costs in step] for step in per_step]
    overall = sum(map(sum, times)) / sum(map(sum, aims))
    worst_step = max(sum(t) / sum(a) for t, a in zip(times, aims, strict=True))
    worst_pack = max(t / a for ts, step in zip(times, aims, strict=True) for t, a in zip(ts, step, strict=True))
    print(f"{rule:<44}{overall:>9.4f}{worst_step:>12.4f}{worst_pack:>12.4f}")


if __name__ == "__main__":
    main()
