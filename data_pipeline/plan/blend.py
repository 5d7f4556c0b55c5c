"""From sources to one stream of pieces: what the packs are made of, in order.

Every source is a stream of its own: samples as `Shuffle` orders them, one that is longer than a sequence in several
pieces, or in none. The streams are blended by TOKENS: the next piece comes from the source whose tokens so far are
furthest behind its weight. With weights 2 and 1, and pieces of 4 tokens from a and 3 from b, that is

    a    b    a    b    a    a     b         each from the source where tokens / weight is least, the first of equals
    0/2  0/1  4/2  3/1  8/2  12/2  6/1       what that is before the piece is drawn

These numbers rise along each stream, so the blend is nothing but all pieces sorted by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.plan.shuffle import Shuffle


class SourceTable(Protocol):
    """What the plan needs of a source (`source.Source`)."""

    label: str
    weight: float
    epochs: float  # 0: endless
    lengths: np.ndarray  # int [samples], tokens
    patches: np.ndarray  # int [samples], of all pictures and frame pairs
    patches_squared: np.ndarray  # int [samples], sum over these of the squares of their patches
    is_text: np.ndarray  # bool [samples]: may be cut anywhere
    shard_rows: np.ndarray  # int [shards + 1], first row of every shard

    def blocks(self, row: int) -> Sequence[tuple[int, int]]:
        """(start, length) in tokens of every picture and clip, with the tokens that begin and end it."""
        ...

    def domain_of(self, row: int) -> str: ...


@dataclass(frozen=True)
class Pieces:
    """A stretch of a stream of pieces, in columns: int64 [pieces]."""

    source: np.ndarray
    number: np.ndarray  # of the sample in its source's stream
    part: np.ndarray  # which of the sample's pieces
    is_last: np.ndarray  # bool, of the sample's pieces
    row: np.ndarray
    start: np.ndarray  # tokens start..start+length of the sample
    length: np.ndarray  # 0: the sample is too long and is set aside
    patches: np.ndarray
    patches_squared: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: np.ndarray | slice) -> Pieces:
        return Pieces(*(getattr(self, column.name)[which] for column in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Pieces]) -> Pieces:
        return cls(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(cls)))


class Stream:
    """One source's samples, in the order and number in which they are to be seen.

    Raises DataError if nothing in it fits a sequence of seq_length tokens.
    """

    def __init__(self, source: SourceTable, place: int, *, seed: int, seq_length: int, too_long: str):
        self.source, self.place, self.seq_length, self.too_long = source, place, seq_length, too_long
        lengths = np.asarray(source.lengths, np.int64)
        fits = (lengths <= seq_length) | source.is_text
        if not len(lengths):
            raise DataError(
                f"source {source.label!r} has no samples: its rejected.jsonl says why, unless nothing was given: mend "
                "them, or remove the source from data.sources"
            )
        if too_long == "refuse" and not fits.any():
            raise DataError(
                f"source {source.label!r} has no sample that fits train.seq_length {seq_length} (its shortest of "
                f"{len(lengths)} has {lengths.min()} tokens): raise train.seq_length or lower the pixel budgets"
            )
        # An estimate, by which draw() knows how many samples to look at at a time.
        most = {"refuse": 0, "truncate": seq_length, "split": np.iinfo(np.int64).max}[too_long]
        self.mean_length = max(float(np.where(fits, lengths, np.minimum(lengths, most)).mean()), 1.0)
        self.samples = max(1, round(source.epochs * len(lengths))) if source.epochs else None  # None: endless
        self._shuffle = Shuffle(source.shard_rows, seed=seed, name=source.label)

    def left(self, number: int) -> float:
        """Samples from number `number` on."""
        return float("inf") if self.samples is None else max(self.samples - number, 0)

    def check_fruitless(self, samples: int) -> None:
        """Raises DataError if so many samples in a row without a single piece must have a whole epoch among them."""
        if samples >= 2 * self._shuffle.epoch_length - 1:
            raise DataError(
                f"no sample of source {self.source.label!r} can be cut to train.seq_length {self.seq_length}: raise it "
                "or lower the pixel budgets"
            )

    def draw(self, number: int, count: int) -> Pieces:
        """All pieces of samples number .. number + count of the stream."""
        rows = self._shuffle.rows(number, count)
        length = self.source.lengths[rows].astype(np.int64)
        fits = length <= self.seq_length
        whole = Pieces(
            source=np.full(count, self.place),
            number=np.arange(number, number + count),
            part=np.zeros(count, np.int64),
            is_last=np.ones(count, bool),
            row=rows,
            start=np.zeros(count, np.int64),
            length=length,
            patches=self.source.patches[rows].astype(np.int64),
            patches_squared=self.source.patches_squared[rows].astype(np.int64),
        )
        return whole if fits.all() else self._cut(whole, fits)

    def _cut(self, whole: Pieces, fits: np.ndarray) -> Pieces:
        """The same with what does not fit in pieces. Long texts are many and simple, the others few."""
        is_text = self.source.is_text[whole.row]
        counts = np.where(is_text, -(-whole.length // self.seq_length), 1)
        cuts = {}
        for place in np.flatnonzero(~fits & ~is_text).tolist():
            cuts[place] = self._cut_with_images(int(whole.row[place]), int(whole.length[place]))
            counts[place] = max(len(cuts[place]), 1)
        sample = np.repeat(np.arange(len(whole)), counts)
        first = np.cumsum(counts) - counts
        pieces = whole[sample]
        pieces.part[:] = np.arange(len(sample)) - first[sample]
        pieces.is_last[:-1] = pieces.part[1:] == 0
        pieces.start[:] = pieces.part * self.seq_length
        pieces.length[:] = np.minimum(pieces.length - pieces.start, self.seq_length)
        for place, cut in cuts.items():
            begin = first[place]
            pieces.length[begin] = 0
            for number, (start, length, share) in enumerate(cut, start=begin):
                pieces.start[number], pieces.length[number] = start, length
                pieces.patches[number] *= share
                pieces.patches_squared[number] *= share
        return pieces

    def _cut_with_images(self, row: int, length: int) -> list[tuple[int, int, float]]:
        """(start, length, share of the sample's images) of every piece; none if the sample is to be set aside."""
        if self.too_long == "refuse" or (self.too_long == "split" and self.source.domain_of(row) == "chat"):
            return []
        blocks = list(self.source.blocks(row))
        pieces = cut_between_blocks(length, blocks, self.seq_length)
        if self.too_long == "truncate":
            pieces = pieces[:1]
        elif sum(n for _, n in pieces) < length:
            return []  # a block is longer than a sequence
        shares = [image_share(blocks, start, n) for start, n in pieces]
        if self.too_long == "truncate" and blocks and not any(shares):
            return []  # what is left has nothing to look at
        return [(start, n, share) for (start, n), share in zip(pieces, shares, strict=True)]


def cut_between_blocks(length: int, blocks: Sequence[tuple[int, int]], seq_length: int) -> list[tuple[int, int]]:
    """(start, length) of the fewest pieces of at most seq_length tokens that cut through no block.

    cut_between_blocks(10, [(3, 4)], 6)  ->  [(0, 3), (3, 6), (9, 1)]

    Pieces end before a block that is itself longer than a piece; if none comes before it, there are none at all.
    """
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < length:
        end = min(start + seq_length, length)
        end = next((at for at, size in blocks if at < end < at + size), end)
        if end <= start:
            break
        pieces.append((start, end - start))
        start = end
    return pieces


def image_share(blocks: Sequence[tuple[int, int]], start: int, length: int) -> float:
    """How much of a sample's pictures and clips, by their tokens, is in the piece start..start+length."""
    inside = sum(size for at, size in blocks if start <= at < start + length)
    return inside / max(sum(size for _, size in blocks), 1)


class Place(NamedTuple):
    """How far a source's stream has been used: samples, pieces of the next one, and tokens of all of them."""

    drawn: int = 0
    parts: int = 0
    tokens: int = 0


def blend(streams: Sequence[Stream], places: Sequence[Place], room: int, multiple: int) -> tuple[Pieces, bool]:
    """The next pieces of the blend, as many as take no more than `room` tokens, each padded to a multiple of
    `multiple`; and whether they are all that is left."""
    heads = [_Head(stream, place) for stream, place in zip(streams, places, strict=True)]
    # tokens / weight, alike for all live sources but for a piece, up to which they together have what is wanted.
    level, missing = _mean_level(heads), float(room)
    while missing > 0 and (live := [head for head in heads if not head.ended]):
        level += missing / sum(head.weight for head in live)
        for head in live:
            head.draw_up_to(level)
        missing = room - sum(head.padded_below(level, multiple) for head in heads)
    ended = missing > 0
    # Above the level, sources that have not ended may have pieces that are not drawn yet.
    pieces = Pieces.join([head.pieces for head in heads])
    keys = np.concatenate([head.keys for head in heads])
    order = np.argsort(keys, kind="stable")
    if not ended:
        order = order[: np.searchsorted(keys[order], level)]
    pieces = pieces[order]
    used = np.cumsum(padded(pieces.length, multiple))
    fitting = int(np.searchsorted(used, room, side="right"))
    return pieces[:fitting], ended and fitting == len(pieces)


def _mean_level(heads: Sequence[_Head]) -> float:
    live = [head for head in heads if not head.ended]
    return sum(head.place.tokens for head in live) / sum(head.weight for head in live) if live else 0.0


class _Head:
    """The pieces of one stream from a place on, as many as have been asked for."""

    def __init__(self, stream: Stream, place: Place):
        self.stream, self.place, self.weight = stream, place, stream.source.weight
        self.pieces = stream.draw(place.drawn, 0)
        self.keys = np.empty(0)  # float64 [pieces]: tokens / weight before each
        self._number, self._tokens = place.drawn, place.tokens

    @property
    def ended(self) -> bool:
        return not self.stream.left(self._number)

    def draw_up_to(self, level: float) -> None:
        """Until tokens / weight reach the level or the stream ends."""
        wanted = level * self.weight
        fruitless = 0
        while self._tokens < wanted and not self.ended:
            count = min(16 + int((wanted - self._tokens) / self.stream.mean_length), self.stream.left(self._number))
            new = self.stream.draw(self._number, int(count))
            new = new[(new.number > self.place.drawn) | (new.part >= self.place.parts)]
            before = self._tokens + np.cumsum(new.length) - new.length
            self.pieces = Pieces.join([self.pieces, new])
            self.keys = np.concatenate([self.keys, before / self.weight])
            self._number += int(count)
            self._tokens += int(new.length.sum())
            fruitless = 0 if new.length.any() else fruitless + int(count)
            self.stream.check_fruitless(fruitless)

    def padded_below(self, level: float, multiple: int) -> int:
        return int(padded(self.pieces.length[: np.searchsorted(self.keys, level)], multiple).sum())


def places_after(places: Sequence[Place], used: Pieces) -> tuple[Place, ...]:
    """Where the streams stand when these pieces of theirs, which begin at `places`, have been used."""
    newest = np.full(len(places), -1)
    newest[used.source] = np.arange(len(used))  # of several pieces of a source the last one stays
    tokens = np.bincount(used.source, used.length, len(places)).astype(np.int64)
    after = list(places)
    for source in np.flatnonzero(newest >= 0).tolist():
        number, part, last = (int(column[newest[source]]) for column in (used.number, used.part, used.is_last))
        after[source] = Place(number + last, 0 if last else part + 1, places[source].tokens + int(tokens[source]))
    return tuple(after)


def padded(length: np.ndarray, multiple: int) -> np.ndarray:
    return -(-length // multiple) * multiple
