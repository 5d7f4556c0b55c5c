"""Assigns the images of a micro-batch to ranks, so that the busiest rank has as little work as possible.

    costs 9 7 6 5 5, 2 ranks     longest first                                     9 5   | 7 6 5      14 | 18
                                 while it helps, the busiest rank gives an image
                                 away, or swaps it for a cheaper one               9 7   | 6 5 5      16 | 16

Swaps of one image for one may miss the optimum, so up to twelve images are tried in every way. Every rank computes the
whole assignment itself, so it is a function of the costs alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

FEW = 12  # images for which every assignment is tried

Assignment = list[list[int]]  # the images of each rank, by index


def assign_images(costs: Sequence[int], ranks: int) -> Assignment:
    """Assign every image to one rank.

    Args:
        costs: Cost of each image, positive (`model.flops.image_cost`).
        ranks: Number of ranks.

    Returns:
        For each rank the indices of its images, ascending; empty for some ranks if there are fewer images than ranks.

    >>> assign_images([9, 7, 6, 5, 5], ranks=2)
    [[0, 1], [2, 3, 4]]
    """
    assignment = _longest_first(costs, ranks)
    while _relieve_busiest(assignment, costs) or _divide_two_again(assignment, costs):
        pass
    if len(costs) <= FEW:
        assignment = _best_of_all(assignment, costs)
    return [sorted(images) for images in assignment]


def _longest_first(costs: Sequence[int], ranks: int) -> Assignment:
    """Give each image, the most expensive first, to the rank with the least load.

    Graham 1969: at most 4/3 of the optimum.
    """
    assignment: Assignment = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for image in sorted(range(len(costs)), key=lambda image: (-costs[image], image)):
        least_loaded = loads.index(min(loads))
        assignment[least_loaded].append(image)
        loads[least_loaded] += costs[image]
    return assignment


def _loads(assignment: Assignment, costs: Sequence[int]) -> list[int]:
    return [sum(costs[image] for image in images) for images in assignment]


def _relieve_busiest(assignment: Assignment, costs: Sequence[int]) -> bool:
    """Move an image from the busiest rank to another, or swap it for a cheaper one, if both then have less load.

    Returns:
        Whether such an image exists.
    """
    loads = _loads(assignment, costs)
    busiest = loads.index(max(loads))
    nothing = -1
    found = []
    for other, load in enumerate(loads):
        gap = loads[busiest] - load
        in_return = sorted([(0, nothing), *((costs[image], image) for image in assignment[other])])
        for given in assignment[busiest]:
            # Moving half of the gap is best: try the two images between which that lies.
            at = bisect_left(in_return, (costs[given] - gap // 2, nothing))
            for cost, taken in in_return[max(at - 1, 0) : at + 1]:
                moved = costs[given] - cost
                if 0 < moved < gap:
                    found.append((max(loads[busiest] - moved, load + moved), other, given, taken))
    if not found:
        return False
    _, other, given, taken = min(found)
    assignment[busiest].remove(given)
    assignment[other].append(given)
    if taken != nothing:
        assignment[other].remove(taken)
        assignment[busiest].append(taken)
    return True


def _divide_two_again(assignment: Assignment, costs: Sequence[int]) -> bool:
    """Divide the images of the busiest rank and one other in the best way, if they are few.

    Returns:
        Whether that helps for any other rank.
    """
    loads = _loads(assignment, costs)
    busiest = loads.index(max(loads))
    for other in sorted(range(len(assignment)), key=lambda rank: (loads[rank], rank)):
        if other != busiest and len(assignment[busiest]) + len(assignment[other]) <= FEW:
            before = [assignment[busiest], assignment[other]]
            after = _best_of_all(before, costs)
            if after is not before:
                assignment[busiest], assignment[other] = after
                return True
    return False


def _best_of_all(assignment: Assignment, costs: Sequence[int]) -> Assignment:
    """Return the best way to divide the images of `assignment`, or `assignment` itself if none is better.

    The most expensive image comes first, so that a branch whose busiest rank is no better than the best known is
    abandoned early. Of ranks with equal loads only one is tried.
    """
    images = sorted((image for of_rank in assignment for image in of_rank), key=lambda image: (-costs[image], image))
    best, least = assignment, max(_loads(assignment, costs))
    trial: Assignment = [[] for _ in assignment]
    loads = [0] * len(assignment)

    def place(n: int) -> None:
        nonlocal best, least
        if n == len(images):
            best, least = [list(of_rank) for of_rank in trial], max(loads)
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
