"""The plan: which samples make up which pack, as a pure function of seed, index, mixture and counters.

    sources  --draw-->  one stream of pieces  --pack-->  a window of packs  --balance-->  whole steps

A window is a whole number of steps. It takes as much of the stream as fills its packs (`draw`), best fit (`pack`);
pieces are then exchanged and packs put in order so that the ranks of a micro-step have alike work to do (`balance`).
Nothing is left over from a window but how far every source has been used, so the position in the data is a few
counters (`Position`), whatever happens between two steps.

Neither the data-parallel size nor the number of workers takes part: rank r of n works on packs r, r + n, r + 2n ... of
a step, and packs that stand next to each other in a step are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.plan.balance import deal, exchange, totals
from data_pipeline.plan.blend import Pieces, Place, SourceTable, Stream, blend, places_after
from data_pipeline.plan.pack import pack
from data_pipeline.plan.pack_cost import PackCost

MIN_WINDOW_PACKS = 128  # small batches still get a window wide enough to be packed well
FILL = 0.9885  # of a window's tokens are drawn, the padding of segments included
EVEN = 0.024  # packs are filled by this / pieces of a pack further than that at most, where that can be: all alike
ALONE = 0.93  # a piece that fills so much of a pack has it for itself: such packs cost most as they are
HEAVY_PART = 16  # one pack of so many may be much costlier than the others
COST_UNIT = 1 << 24  # a sequence of one text; costs are whole numbers, so that every machine makes the same plan


class Piece(NamedTuple):
    """Tokens start..start+length of sample `row` of source `source`: a whole sample, or part of a long one."""

    source: int
    row: int
    start: int
    length: int


class Pack(NamedTuple):
    """One sequence of training. too_long: samples set aside because they do not fit any sequence."""

    pieces: Sequence[Piece]
    too_long: Sequence[Piece] = ()


@dataclass(frozen=True)
class Position:
    """A place in the stream of steps: how far each source had been used before the current window, and how many steps
    of that window have been taken."""

    places: tuple[Place, ...]
    steps: int = 0

    @classmethod
    def start(cls, sources: int) -> Position:
        return cls((Place(),) * sources)

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"places": [list(place) for place in self.places], "steps": self.steps}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        return cls(tuple(Place(*place) for place in state["places"]), state["steps"])


class Plan:
    """See the module.

    too_long: what becomes of samples longer than seq_length that are not plain text. `refuse` sets them aside,
    `truncate` keeps as much of the beginning as fits, `split` makes as many pieces as are needed; neither cuts through
    a picture or clip, and a chat is never split. Plain text is always split.

    Raises DataError if a source has nothing that fits, or seq_length is not a whole number of segment_multiple.
    """

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
    ):
        if seq_length % segment_multiple:
            raise DataError(
                f"train.seq_length {seq_length} is not a multiple of data.segment_multiple {segment_multiple}: "
                f"use {-(-seq_length // segment_multiple) * segment_multiple}"
            )
        self.sources = sources
        self.seed, self.seq_length, self.segment_multiple = seed, seq_length, segment_multiple
        self.global_batch_size, self.cost, self.too_long = global_batch_size, cost, too_long
        self._streams = [
            Stream(source, place, seed=seed, seq_length=seq_length, too_long=too_long)
            for place, source in enumerate(sources)
        ]
        self._window_steps = -(-MIN_WINDOW_PACKS // global_batch_size)
        # Powers of two, as data-parallel sizes are, so that heavy packs have micro-steps to themselves.
        heavy = global_batch_size // HEAVY_PART
        self._heavy_in_step = 1 << (heavy.bit_length() - 1) if heavy else 0

    def steps(self, position: Position) -> Iterator[tuple[list[Pack], Position]]:
        """Every step's packs from `position` on, each with the position after it. Ends when all sources are used up;
        the packs of the last step may be less than full."""
        while True:
            steps, next_window = self.window(position)
            if not steps:
                return
            for number in range(position.steps, len(steps)):
                done = number + 1 == len(steps)
                yield steps[number], next_window if done else replace(position, steps=number + 1)
            position = next_window

    def window(self, position: Position) -> tuple[list[list[Pack]], Position]:
        """All steps of the window that `position` lies in, and the beginning of the next window."""
        drawn, layout = self._fill(position)
        after = Position(places_after(position.places, drawn))
        random = np.random.Generator(np.random.PCG64([self.seed, *(n for place in position.places for n in place)]))
        too_long, pieces = drawn[drawn.length == 0], drawn[drawn.length > 0]
        if not layout.packs:
            return [], after
        costs = self._costs(pieces)
        chosen = exchange(
            layout.chosen,
            sizes=self._sizes(pieces),
            costs=costs,
            patches=pieces.patches,
            count=layout.packs,
            capacity=self.seq_length // self.segment_multiple,
            heavy=layout.heavy,
            random=random,
        )
        order = deal(
            totals(chosen, costs, layout.packs),
            totals(chosen, pieces.patches, layout.packs),
            steps=layout.packs // self.global_batch_size,
            random=random,
        )
        packs = _gather(pieces, chosen, layout.packs)
        steps = [[packs[number] for number in step] for step in order.tolist()]
        aside = [
            Piece(source, row, 0, int(self.sources[source].lengths[row]))
            for source, row in zip(too_long.source.tolist(), too_long.row.tolist(), strict=True)
        ]
        steps[0][0] = steps[0][0]._replace(too_long=aside)
        return steps, after

    def _fill(self, position: Position) -> tuple[Pieces, _Layout]:
        """The next pieces of the stream, and the packs of those that have a length: as many as a window holds."""
        packs = self._window_steps * self.global_batch_size
        drawn, ended = blend(self._streams, position.places, int(FILL * packs * self.seq_length), self.segment_multiple)
        if ended:
            needed = self._sizes(drawn).sum() * self.segment_multiple / (FILL * self.seq_length)
            packs = min(packs, math.ceil(needed / self.global_batch_size) * self.global_batch_size)
        while True:
            sizes = self._sizes(drawn)
            layout = self._lay_out(sizes[sizes > 0], packs)
            missing = layout.chosen < 0
            if not missing.any():
                return drawn, layout
            if ended and packs < self._window_steps * self.global_batch_size:
                packs += self.global_batch_size
            else:  # only as much of the stream as has found room
                placed = sizes.sum() - sizes[sizes > 0][missing].sum()
                drawn = drawn[: np.searchsorted(np.cumsum(sizes), placed, side="right")]

    def _lay_out(self, sizes: np.ndarray, packs: int) -> _Layout:
        """Pieces of these sizes in packs that are evenly filled, or else in packs that are as full as can be."""
        capacity = self.seq_length // self.segment_multiple
        share = min(FILL + EVEN * packs / max(len(sizes), 1), 1)
        for even in (int(share * capacity), int((share + 1) / 2 * capacity)):
            alone = sizes > min(ALONE * capacity, even)  # the first packs
            own = int(alone.sum())
            if own >= packs:
                break
            heavy = max(0, self._heavy_in_step * packs // self.global_batch_size - own)
            chosen = np.empty(len(sizes), np.int64)
            others = pack(sizes[~alone], capacity=even, packs=packs - own, heavy=heavy)
            if (others >= 0).all():
                chosen[alone], chosen[~alone] = np.arange(own), own + others
                return _Layout(chosen, packs, own + heavy)
        return _Layout(pack(sizes, capacity=capacity, packs=packs, spread_share=0), packs, heavy=0)

    def _sizes(self, pieces: Pieces) -> np.ndarray:
        """int64 [pieces], in segment multiples."""
        return -(-pieces.length // self.segment_multiple)

    def _costs(self, pieces: Pieces) -> np.ndarray:
        """int64 [pieces], in parts of what a sequence of one text costs."""
        costs = self.cost.of(pieces.length, pieces.patches, pieces.patches_squared)
        return (costs * (COST_UNIT / float(self.cost.of(self.seq_length)))).astype(np.int64)


class _Layout(NamedTuple):
    """chosen: int64 [pieces], the pack of each, -1 where none has room. heavy: packs that cost what they do."""

    chosen: np.ndarray
    packs: int
    heavy: int


def _gather(pieces: Pieces, chosen: np.ndarray, count: int) -> list[Pack]:
    by_pack = np.argsort(chosen, kind="stable")
    columns = (column[by_pack].tolist() for column in (pieces.source, pieces.row, pieces.start, pieces.length))
    sorted_pieces = list(map(Piece, *columns))
    ends = np.cumsum(np.bincount(chosen, minlength=count)).tolist()
    return [Pack(sorted_pieces[begin:end]) for begin, end in pairwise([0, *ends])]
