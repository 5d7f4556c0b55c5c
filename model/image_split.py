"""The images of a micro-batch, shared out over ranks so that the busiest has as little to do as can be.

    costs 9 7 6 5 5, 2 ranks     longest first                                     9 5   | 7 6 5      14 | 18
                                 the busiest gives an image, or changes it for
                                 a cheaper one, as long as that helps              9 7   | 6 5 5      16 | 16

Exchanges of one for one may miss the best where there are few images; up to twelve are divided in every way. Every rank
computes the whole split for itself, so it is a function of the costs alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

FEW = 12

Shares = list[list[int]]  # the images of each rank


def split_images(costs: Sequence[int], ranks: int) -> Shares:
    """Which images each rank computes.

    Args:
        costs: of the images, positive integers (`model.flops.image_cost`).
        ranks: that share them.

    Returns:
        For each rank the indices of its images, rising; none for some ranks if there are fewer images than ranks.

    >>> split_images([9, 7, 6, 5, 5], ranks=2)
    [[0, 1], [2, 3, 4]]
    """
    shares = _longest_first(costs, ranks)
    while _exchange(shares, costs) or _divide_two_anew(shares, costs):
        pass
    if len(costs) <= FEW:
        shares = _every_way(shares, costs)
    return [sorted(share) for share in shares]


def _longest_first(costs: Sequence[int], ranks: int) -> Shares:
    """Each image, from the costliest down, to the rank that has least so far (Graham 1969: at most 4/3 of the best)."""
    shares: Shares = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for image in sorted(range(len(costs)), key=lambda image: (-costs[image], image)):
        idlest = loads.index(min(loads))
        shares[idlest].append(image)
        loads[idlest] += costs[image]
    return shares


def _loads(shares: Shares, costs: Sequence[int]) -> list[int]:
    return [sum(costs[image] for image in share) for share in shares]


def _exchange(shares: Shares, costs: Sequence[int]) -> bool:
    """Move one image from the busiest rank to another, for a cheaper one or for nothing, so that both have less than
    the busiest had. False if that cannot be."""
    loads = _loads(shares, costs)
    busiest = loads.index(max(loads))
    nothing = -1
    found = []
    for other, load in enumerate(loads):
        gap = loads[busiest] - load
        theirs = sorted([(0, nothing), *((costs[image], image) for image in shares[other])])
        for given in shares[busiest]:
            # Best is to move half of the gap: look at the two of theirs between which that lies.
            at = bisect_left(theirs, (costs[given] - gap // 2, nothing))
            for cost, taken in theirs[max(at - 1, 0) : at + 1]:
                moved = costs[given] - cost
                if 0 < moved < gap:
                    found.append((max(loads[busiest] - moved, load + moved), other, given, taken))
    if not found:
        return False
    _, other, given, taken = min(found)
    shares[busiest].remove(given)
    shares[other].append(given)
    if taken != nothing:
        shares[other].remove(taken)
        shares[busiest].append(taken)
    return True


def _divide_two_anew(shares: Shares, costs: Sequence[int]) -> bool:
    """Divide the images of the busiest rank and of another in the best way, if they are few. False if none helps."""
    loads = _loads(shares, costs)
    busiest = loads.index(max(loads))
    for other in sorted(range(len(shares)), key=lambda rank: (loads[rank], rank)):
        if other != busiest and len(shares[busiest]) + len(shares[other]) <= FEW:
            before = [shares[busiest], shares[other]]
            after = _every_way(before, costs)
            if after is not before:
                shares[busiest], shares[other] = after
                return True
    return False


def _every_way(shares: Shares, costs: Sequence[int]) -> Shares:
    """The best way to divide the images of `shares`; `shares` itself if none is better.

    Costliest image first, so that a way whose busiest rank is no better than the best known is given up early; of ranks
    with equal loads only one is tried.
    """
    images = sorted((image for share in shares for image in share), key=lambda image: (-costs[image], image))
    best, least = shares, max(_loads(shares, costs))
    trial: Shares = [[] for _ in shares]
    loads = [0] * len(shares)

    def place(n: int) -> None:
        nonlocal best, least
        if n == len(images):
            best, least = [list(share) for share in trial], max(loads)
            return
        cost = costs[images[n]]
        for load in sorted(set(loads)):
            if load + cost >= least:
                return
            rank = loads.index(load)
            trial[rank].append(images[n])
            loads[rank] += cost
            place(n + 1)
            loads[rank] -= cost
            trial[rank].pop()

    if images:
        place(0)
    return best
