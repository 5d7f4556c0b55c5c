"""The plan: which samples make up which pack, as a pure function of seed, index, mixture and counters.

Each source is an endless stream: all of its samples in an order drawn from (seed, source, epoch), epoch after epoch.
Sources are blended by TOKENS: the next sample comes from the source whose tokens are furthest behind its weight. The
blended stream is cut into windows of a fixed number of tokens, every window is packed first-fit on its own, and the
packs of all windows, one after the other, are what training consumes: step k takes the next global_batch_size of them.

So the position in the data is a few counters (`Position`), whatever happens between two steps, and neither the
data-parallel size nor the number of workers takes part in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from data_pipeline.batch import padded_length
from data_pipeline.errors import DataError
from data_pipeline.pack import pack_first_fit

MIN_WINDOW_PACKS = 64  # small batches still get a window wide enough to be packed well
WINDOW_STEPS = 8


class SourceTable(Protocol):
    """What the plan needs of a source (`index.Source`)."""

    label: str
    weight: float
    lengths: np.ndarray  # int64 [samples]
    is_text: np.ndarray  # bool [samples]: may be cut anywhere


@dataclass(frozen=True)
class Piece:
    """Tokens start..start+length of sample `row` of source `source`: a whole sample, or part of a long text."""

    source: int
    row: int
    start: int
    length: int


@dataclass
class Pack:
    """One sequence of training. too_long: samples set aside because they do not fit any sequence."""

    pieces: list[Piece]
    too_long: list[Piece] = field(default_factory=list)


@dataclass(frozen=True)
class Position:
    """A place in the stream of packs: samples drawn and tokens placed of each source before the current window, and
    packs consumed of that window."""

    drawn: tuple[int, ...]
    tokens: tuple[int, ...]
    packs: int = 0

    @classmethod
    def start(cls, sources: int) -> Position:
        return cls((0,) * sources, (0,) * sources)


class Plan:
    """See the module. Raises DataError if a source has nothing that fits, or seq_length is not a whole number of
    segment_multiple."""

    def __init__(
        self,
        sources: Sequence[SourceTable],
        *,
        seed: int,
        seq_length: int,
        segment_multiple: int,
        global_batch_size: int,
    ):
        if seq_length % segment_multiple:
            raise DataError(
                f"train.seq_length {seq_length} is not a multiple of data.segment_multiple {segment_multiple}: "
                f"use {padded_length(seq_length, segment_multiple)}"
            )
        for source in sources:
            if not any(_fits(source, row, seq_length) for row in range(len(source.lengths))):
                shortest = int(source.lengths.min()) if len(source.lengths) else 0
                raise DataError(
                    f"source {source.label!r} has no sample that fits train.seq_length {seq_length} (its shortest of "
                    f"{len(source.lengths)} has {shortest} tokens): raise train.seq_length or lower the pixel budgets"
                )
        self.sources = sources
        self.seed = seed
        self.seq_length = seq_length
        self.segment_multiple = segment_multiple
        self.global_batch_size = global_batch_size
        self.window_tokens = max(MIN_WINDOW_PACKS, WINDOW_STEPS * global_batch_size) * seq_length
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source -> (epoch, its order)

    def steps(self, position: Position) -> Iterator[tuple[list[Pack], Position]]:
        """Every step's packs from `position` on, each with the position after it. Endless."""
        packs, next_window = self.window(position)
        while True:
            step: list[Pack] = []
            while len(step) < self.global_batch_size:
                if position.packs == len(packs):
                    position = next_window
                    packs, next_window = self.window(position)
                taken = packs[position.packs : position.packs + self.global_batch_size - len(step)]
                step += taken
                position = Position(position.drawn, position.tokens, position.packs + len(taken))
            yield step, position

    def window(self, position: Position) -> tuple[list[Pack], Position]:
        """All packs of the window that `position` lies in, and the beginning of the next window."""
        drawn, tokens = list(position.drawn), list(position.tokens)
        pieces: list[Piece] = []
        too_long: list[Piece] = []
        room = self.window_tokens
        while room > 0:
            source = min(range(len(self.sources)), key=lambda s: (tokens[s] / self.sources[s].weight, s))
            new = self._draw(source, drawn[source])
            drawn[source] += 1
            if not new:
                row = self._row(source, drawn[source] - 1)
                too_long.append(Piece(source, row, 0, int(self.sources[source].lengths[row])))
            tokens[source] += sum(piece.length for piece in new)
            room -= sum(padded_length(piece.length, self.segment_multiple) for piece in new)
            pieces += new
        sizes = [padded_length(piece.length, self.segment_multiple) for piece in pieces]
        packs = [Pack([pieces[item] for item in items]) for items in pack_first_fit(sizes, self.seq_length)]
        packs[0].too_long = too_long
        return packs, Position(tuple(drawn), tuple(tokens))

    def _draw(self, source: int, number: int) -> list[Piece]:
        """A sample of a source's stream: one piece, several if it is a long text, none if it cannot be placed."""
        row = self._row(source, number)
        length = int(self.sources[source].lengths[row])
        if not _fits(self.sources[source], row, self.seq_length):
            return []
        return [
            Piece(source, row, start, min(self.seq_length, length - start))
            for start in range(0, length, self.seq_length)
        ]

    def _row(self, source: int, number: int) -> int:
        samples = len(self.sources[source].lengths)
        epoch, place = divmod(number, samples)
        if self._orders.get(source, (-1, None))[0] != epoch:
            # The source's name, not its place in the list, so that adding a source leaves the others' orders alone.
            name = zlib.crc32(self.sources[source].label.encode())
            order = np.random.Generator(np.random.PCG64([self.seed, name, epoch])).permutation(samples)
            self._orders[source] = (epoch, order)
        return int(self._orders[source][1][place])


def _fits(source: SourceTable, row: int, seq_length: int) -> bool:
    """Whether a sample can be placed: images are never cut, but plain text may be."""
    return bool(source.lengths[row] <= seq_length) or bool(source.is_text[row])
