"""The plan: which samples make up which pack, as a pure function of seed, index, mixture and counters.

    sources  --blend-->  one stream of pieces  --pack-->  a window of packs  --balance-->  whole steps

A window is a whole number of steps. It takes as much of the stream as fills its packs (`blend`), placed by best fit
(`pack`). Then pieces are exchanged and packs are ordered so that the ranks of a micro-step have about the same work
(`balance`). A window leaves nothing behind except how much of every source has been used. So the position
between any two steps is a few counters (`PlanPosition`).

The plan depends neither on the data-parallel size nor on the number of workers: rank r of n processes packs r, r + n,
r + 2n ... of a step, and neighbouring packs of a step need about the same work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.plan.balance import arrange_steps, exchange_pieces, sum_per_pack
from data_pipeline.plan.blend import Pieces, SourceTable, Stream, StreamPosition, blend, positions_after
from data_pipeline.plan.pack import pack
from data_pipeline.plan.pack_cost import PackCost

MIN_WINDOW_PACKS = 128  # small batches get a window of several steps, which packs better
FILL = 0.9885  # share of a window's tokens that is filled, padding of segments included
FILL_MARGIN = 0.024  # a pack is filled to at most FILL + this / pieces per pack, if possible: so packs are equal
ALONE = 0.93  # a piece that fills this share of a pack gets a pack of its own: such packs cost most anyway
HEAVY_PART = 16  # one pack in this many may cost much more than the others
COST_UNIT = 1 << 24  # cost of a sequence that is one text; costs are integers, so every machine makes the same plan


class Piece(NamedTuple):
    """A whole sample, or a part of a long one."""

    source: int  # index in Plan.sources
    row: int  # of the sample in its source
    start: int  # first token
    length: int  # tokens


class Pack(NamedTuple):
    """The content of one training sequence."""

    pieces: Sequence[Piece]
    too_long: Sequence[Piece] = ()  # samples that do not fit any sequence; reported with this pack


@dataclass(frozen=True)
class PlanPosition:
    """Where the plan stands: between two steps."""

    streams: tuple[StreamPosition, ...]  # of each source, before the current window
    steps: int = 0  # of the current window that are done

    @classmethod
    def start(cls, sources: int) -> PlanPosition:
        """Return the position before the first step of a plan with `sources` sources."""
        return cls((StreamPosition(),) * sources)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON types."""
        return {"streams": [list(stream) for stream in self.streams], "steps": self.steps}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PlanPosition:
        """Return the position that `state_dict` was called on."""
        return cls(tuple(StreamPosition(*stream) for stream in state["streams"]), state["steps"])


class Plan:
    """The steps of a run, each a list of packs. Attributes have the names of the arguments."""

    def __init__(
        self,
        sources: Sequence[SourceTable],
        *,
        seed: int,
        seq_length: int,
        segment_multiple: int,
        global_batch_size: int,
        cost: PackCost,
        too_long: str = "refuse",
    ) -> None:
        """Prepare the plan; no step is planned yet.

        Args:
            sources: The sources of the mixture.
            seed: Of the order of samples.
            seq_length: Tokens per pack.
            segment_multiple: Segments are padded to a multiple of this many tokens.
            global_batch_size: Packs per step.
            cost: By which packs are balanced.
            too_long: For samples longer than seq_length that are not plain text. `refuse` does not use them,
                `truncate` keeps the beginning, `split` makes several pieces. No image or video is cut, and a chat is
                never split. Plain text is always split.

        Raises:
            DataError: A source has no sample that fits, or seq_length is not a multiple of segment_multiple.
        """
        if seq_length % segment_multiple:
            raise DataError(
                f"train.seq_length {seq_length} is not a multiple of data.segment_multiple {segment_multiple}: "
                f"use {-(-seq_length // segment_multiple) * segment_multiple}"
            )
        self.sources = sources
        self.seed, self.seq_length, self.segment_multiple = seed, seq_length, segment_multiple
        self.global_batch_size, self.cost, self.too_long = global_batch_size, cost, too_long
        self._streams = [
            Stream(source, index, seed=seed, seq_length=seq_length, too_long=too_long)
            for index, source in enumerate(sources)
        ]
        self._window_steps = -(-MIN_WINDOW_PACKS // global_batch_size)
        # A power of two, like data-parallel sizes, so that heavy packs fill whole micro-steps.
        heavy = global_batch_size // HEAVY_PART
        self._heavy_per_step = 1 << (heavy.bit_length() - 1) if heavy else 0

    def steps(self, position: PlanPosition) -> Iterator[tuple[list[Pack], PlanPosition]]:
        """Yield the packs of every step from `position` on, each with the position after it.

        Ends when all sources are used up; the packs of the last step may not be full.
        """
        while True:
            steps, next_window = self.window(position)
            if not steps:
                return
            for number in range(position.steps, len(steps)):
                done = number + 1 == len(steps)
                yield steps[number], next_window if done else replace(position, steps=number + 1)
            position = next_window

    def window(self, position: PlanPosition) -> tuple[list[list[Pack]], PlanPosition]:
        """Return all steps of the window that contains `position`, and the beginning of the next window."""
        taken, packing = self._fill(position)
        after = PlanPosition(positions_after(position.streams, taken))
        rng = np.random.Generator(np.random.PCG64([self.seed, *(n for stream in position.streams for n in stream)]))
        too_long, pieces = taken[taken.length == 0], taken[taken.length > 0]
        if not packing.packs:
            return [], after
        costs = self._costs(pieces)
        chosen = exchange_pieces(
            packing.chosen,
            sizes=self._sizes(pieces),
            costs=costs,
            patches=pieces.patches,
            count=packing.packs,
            capacity=self.seq_length // self.segment_multiple,
            heavy=packing.heavy,
            rng=rng,
        )
        order = arrange_steps(
            sum_per_pack(chosen, costs, packing.packs),
            sum_per_pack(chosen, pieces.patches, packing.packs),
            steps=packing.packs // self.global_batch_size,
            rng=rng,
        )
        packs = _to_packs(pieces, chosen, packing.packs)
        steps = [[packs[number] for number in step] for step in order.tolist()]
        unused = [
            Piece(source, row, 0, int(self.sources[source].lengths[row]))
            for source, row in zip(too_long.source.tolist(), too_long.row.tolist(), strict=True)
        ]
        steps[0][0] = steps[0][0]._replace(too_long=unused)
        return steps, after

    def _fill(self, position: PlanPosition) -> tuple[Pieces, _Packing]:
        """Take as many pieces of the stream as a window holds, and place those that are not too long in packs."""
        packs = self._window_steps * self.global_batch_size
        max_tokens = int(FILL * packs * self.seq_length)
        taken, ended = blend(self._streams, position.streams, max_tokens, self.segment_multiple)
        if ended:
            needed = self._sizes(taken).sum() * self.segment_multiple / (FILL * self.seq_length)
            packs = min(packs, math.ceil(needed / self.global_batch_size) * self.global_batch_size)
        while True:
            sizes = self._sizes(taken)
            packing = self._pack_evenly(sizes[sizes > 0], packs)
            missing = packing.chosen < 0
            if not missing.any():
                return taken, packing
            if ended and packs < self._window_steps * self.global_batch_size:
                packs += self.global_batch_size
            else:  # take only as much of the stream as was placed
                placed = sizes.sum() - sizes[sizes > 0][missing].sum()
                taken = taken[: np.searchsorted(np.cumsum(sizes), placed, side="right")]

    def _pack_evenly(self, sizes: np.ndarray, packs: int) -> _Packing:
        """Place pieces of these sizes in packs that are equally full, or if that fails, as full as possible."""
        capacity = self.seq_length // self.segment_multiple
        share = min(FILL + FILL_MARGIN * packs / max(len(sizes), 1), 1)
        for even in (int(share * capacity), int((share + 1) / 2 * capacity)):
            alone = sizes > min(ALONE * capacity, even)  # these get the first packs
            own = int(alone.sum())
            if own >= packs:
                break
            heavy = max(0, self._heavy_per_step * packs // self.global_batch_size - own)
            chosen = np.empty(len(sizes), np.int64)
            others = pack(sizes[~alone], capacity=even, packs=packs - own, heavy=heavy)
            if (others >= 0).all():
                chosen[alone], chosen[~alone] = np.arange(own), own + others
                return _Packing(chosen, packs, own + heavy)
        return _Packing(pack(sizes, capacity=capacity, packs=packs, spread_share=0), packs, heavy=0)

    def _sizes(self, pieces: Pieces) -> np.ndarray:
        """Return int64 [pieces], in segment multiples."""
        return -(-pieces.length // self.segment_multiple)

    def _costs(self, pieces: Pieces) -> np.ndarray:
        """Return int64 [pieces]; a sequence that is one text costs COST_UNIT."""
        costs = self.cost.of(pieces.length, pieces.patches, pieces.patches_squared)
        return (costs * (COST_UNIT / float(self.cost.of(self.seq_length)))).astype(np.int64)


class _Packing(NamedTuple):
    chosen: np.ndarray  # int64 [pieces], the pack of each; -1: no pack has enough space
    packs: int  # number of packs
    heavy: int  # the first packs, whose costs cannot be balanced


def smallest_steps(plan_of: Callable[..., Plan], most: int) -> int:
    """Return how many packs a step needs at least, for all samples to fit into as few steps as with `most` packs.

    Args:
        plan_of: Makes the plan with `global_batch_size` packs per step. All of its sources have `epochs`.
        most: The largest number of packs per step.
    """
    single = plan_of(global_batch_size=1)
    start = PlanPosition.start(len(single.sources))
    packs = sum(1 for _ in single.steps(start))
    steps = max(-(-packs // most), 1)
    size = max(-(-packs // steps), 1)
    while size < most and sum(1 for _ in plan_of(global_batch_size=size).steps(start)) > steps:
        size += max(size // 50, 1)  # the windows are others, so that the same packs need not suffice
    return min(size, most)


def _to_packs(pieces: Pieces, chosen: np.ndarray, count: int) -> list[Pack]:
    by_pack = np.argsort(chosen, kind="stable")
    columns = (column[by_pack].tolist() for column in (pieces.source, pieces.row, pieces.start, pieces.length))
    sorted_pieces = list(map(Piece, *columns))
    ends = np.cumsum(np.bincount(chosen, minlength=count)).tolist()
    return [Pack(sorted_pieces[begin:end]) for begin, end in pairwise([0, *ends])]
