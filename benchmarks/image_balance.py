"""How evenly the images of a pack are shared out over four ranks, by several rules.

    python -m benchmarks.image_balance

Packs are the data pipeline's own (blended by tokens, packed best fit) over pictures and clips whose sizes are drawn
as real ones come, and resized as the data pipeline resizes them. Costs are GLM-4.5V's, from `model.flops`; nothing is
timed but the split itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from benchmarks.drawn_sources import DrawnSource, Grid, frame_pairs, page, photo, screenshot
from data_pipeline.plan.plan import Pack, Plan, Position
from model.config import GlmvConfig, VisionConfig
from model.flops import image_cost
from model.image_assignment import Assignment, assign_images
from training.pack_cost import pack_cost

RANKS = 4
STEPS = 50
PACKS_A_STEP = 48  # of one data-parallel rank: the report's 1,536 over 32
WEB = (0.45, 0.7)  # megapixels of its pictures, and their spread

# --- packs of drawn samples -------------------------------------------------------------------------------------------


def clip(rng: np.random.Generator) -> list[Grid]:
    """Frame pairs of 2 to 60 seconds at two frames a second."""
    size = ((360, 640), (480, 854), (720, 1280), (1280, 720))[rng.integers(4)]
    return frame_pairs(*size, int(rng.integers(2, 61)))


# What a sample of each source has: images, and least and most tokens of text. The shares of tokens are ours.
SAMPLES: dict[str, tuple[Callable[[np.random.Generator], list[Grid]], int, int]] = {
    "captions": (lambda rng: [photo(rng, *WEB)], 20, 200),
    "interleaved": (lambda rng: [photo(rng, *WEB) for _ in range(rng.integers(2, 9))], 300, 2000),
    "pages": (lambda rng: [page(rng)], 200, 1200),
    "screenshots": (lambda rng: [screenshot(rng)], 50, 400),
    "text": (lambda rng: [], 200, 4000),
    "clips": (clip, 100, 600),
}
MIXTURES = {  # the report keeps clips for the long stage
    8192: {"captions": 3.0, "interleaved": 2.0, "pages": 2.0, "screenshots": 1.0, "text": 1.0},
    32768: {"captions": 2.0, "interleaved": 2.0, "pages": 2.0, "screenshots": 1.0, "text": 1.0, "clips": 2.0},
}


def drawn_source(label: str, weight: float, seq_length: int, count: int = 2000) -> DrawnSource:
    """Samples that fit a pack."""
    rng = np.random.default_rng([sum(label.encode()), seq_length])
    images_of, least, most = SAMPLES[label]
    return DrawnSource.draw(
        label, lambda: (images_of(rng), int(rng.integers(least, most))), count, weight=weight, longest=seq_length
    )


def steps(seq_length: int, packs_a_step: int, seed: int = 0) -> Iterator[list[list[Grid]]]:
    """Step after step, the images of each of its packs. Endless."""
    sources = [drawn_source(label, weight, seq_length) for label, weight in MIXTURES[seq_length].items()]
    plan = Plan(
        sources,
        seed=seed,
        seq_length=seq_length,
        segment_multiple=8,
        global_batch_size=packs_a_step,
        cost=pack_cost(GlmvConfig.from_preset("glm45v")),
    )

    def images_of(pack: Pack) -> list[Grid]:
        return [grid for piece in pack.pieces for grid in sources[piece.source].images[piece.row]]

    for packs, _ in plan.steps(Position.start(len(sources))):
        yield [images_of(pack) for pack in packs]


# --- ways to share them out -------------------------------------------------------------------------------------------


def round_robin(costs: Sequence[int], ranks: int) -> Assignment:
    return [list(range(rank, len(costs), ranks)) for rank in range(ranks)]


def contiguous(costs: Sequence[int], ranks: int) -> Assignment:
    return [part.tolist() for part in np.array_split(np.arange(len(costs)), ranks)]


def everything_everywhere(costs: Sequence[int], ranks: int) -> Assignment:
    return [list(range(len(costs)))] * ranks


WAYS: dict[str, Callable[[Sequence[int], int], Assignment]] = {
    "ours": assign_images,
    "one after the other": round_robin,
    "equal numbers in order": contiguous,
    "every rank all, as ms-swift": everything_everywhere,
}


def slowest(costs: Sequence[int], shares: Assignment) -> int:
    return max(sum(costs[image] for image in share) for share in shares)


def aim(costs: Sequence[int], ranks: int) -> float:
    """An equal share, or the largest image, which is not cut: max(mean, largest)."""
    return max(sum(costs) / ranks, max(costs))


def lower_bound(costs: Sequence[int], ranks: int) -> float:
    """No split is below: of the k*ranks + 1 costliest images, some rank has k + 1, which cost no less than the cheapest
    k + 1 of them."""
    falling = sorted(costs, reverse=True)
    crowded = [sum(falling[k * ranks - k : k * ranks + 1]) for k in range(1, (len(costs) - 1) // ranks + 1)]
    return max(aim(costs, ranks), *crowded, 0)


def main() -> None:
    vision = GlmvConfig.from_preset("glm45v").vision
    for seq_length in MIXTURES:
        of_steps = [step_costs(vision, packs) for packs in islice(steps(seq_length, PACKS_A_STEP), STEPS)]
        images = sum(len(costs) for step in of_steps for costs in step) / (STEPS * PACKS_A_STEP)
        print(
            f"\n{seq_length} tokens: {STEPS} steps of {PACKS_A_STEP} packs, {images:.1f} images a pack, {RANKS} ranks"
        )
        print(f"{'slowest rank over max(mean, largest image)':<44}{'all':>9}{'worst step':>12}{'worst pack':>12}")
        for way, split in WAYS.items():
            _print_row(way, [[slowest(costs, split(costs, RANKS)) for costs in step] for step in of_steps], of_steps)
        bounds = [[lower_bound(costs, RANKS) for costs in step] for step in of_steps]
        _print_row("no split of whole images is better than", bounds, of_steps)
        begin = time.process_time()
        for step in of_steps:
            for costs in step:
                assign_images(costs, RANKS)
        print(f"our split takes {1e3 * (time.process_time() - begin) / (STEPS * PACKS_A_STEP):.2f} ms a pack")


def step_costs(vision: VisionConfig, packs: list[list[Grid]]) -> list[list[int]]:
    """Costs of the images of each pack that has any."""
    return [[image_cost(vision, h, w) for h, w in grids] for grids in packs if grids]


def _print_row(way: str, times: Sequence[Sequence[float]], of_steps: Sequence[Sequence[Sequence[int]]]) -> None:
    aims = [[aim(costs, RANKS) for costs in step] for step in of_steps]
    overall = sum(map(sum, times)) / sum(map(sum, aims))
    worst_step = max(sum(t) / sum(a) for t, a in zip(times, aims, strict=True))
    worst_pack = max(t / a for ts, step in zip(times, aims, strict=True) for t, a in zip(ts, step, strict=True))
    print(f"{way:<44}{overall:>9.4f}{worst_step:>12.4f}{worst_pack:>12.4f}")


if __name__ == "__main__":
    main()
