"""Blending: one stream of pieces out of all sources.

Every source is a stream of its own: samples in the order of `Shuffle`; a sample longer than a sequence becomes several
pieces, or none. The streams are blended by TOKENS: the next piece comes from the source whose tokens so far are
furthest behind its weight. With weights 2 and 1, and pieces of 4 tokens from a and 3 from b, that is

    a    b    a    b    a    a     b         each from the source with the least tokens / weight, the first of equals
    0/2  0/1  4/2  3/1  8/2  12/2  6/1       tokens / weight before the piece is taken

These numbers rise along each stream, so the blend is simply all pieces sorted by them.
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
    patches: np.ndarray  # int [samples], sum over the images and frame pairs of a sample
    patches_squared: np.ndarray  # int [samples], sum of the squares of their patches
    is_text: np.ndarray  # bool [samples], may be split at any token
    shard_rows: np.ndarray  # int [shards + 1], first row of every shard, then the number of rows

    def blocks(self, row: int) -> Sequence[tuple[int, int]]:
        """Return (start, length) in tokens of every image and video, including its begin and end tokens."""
        ...

    def domain_of(self, row: int) -> str:
        """Return the domain of a sample."""
        ...


@dataclass(frozen=True)
class Pieces:
    """Consecutive pieces of a stream, in columns: int64 [pieces]."""

    source: np.ndarray  # index of the source
    number: np.ndarray  # of the sample in its source's stream
    index: np.ndarray  # of the piece among the pieces of its sample
    is_last: np.ndarray  # bool: the last piece of its sample
    row: np.ndarray  # of the sample in its source
    start: np.ndarray  # first token of the piece in its sample
    length: np.ndarray  # tokens; 0: the sample is too long
    patches: np.ndarray  # of the piece's images
    patches_squared: np.ndarray  # sum of their squares

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: np.ndarray | slice) -> Pieces:
        return Pieces(*(getattr(self, column.name)[which] for column in fields(self)))

    @classmethod
    def join(cls, stretches: Sequence[Pieces]) -> Pieces:
        """Concatenate several stretches of pieces."""
        return cls(*(np.concatenate([getattr(one, column.name) for one in stretches]) for column in fields(cls)))


class Stream:
    """The samples of one source in the order in which they are used, as often as `epochs` says.

    Attributes:
        source: The source.
        mean_length: Estimated tokens per sample that is used.
        samples: Number of samples of the whole stream; None: endless.
    """

    def __init__(self, source: SourceTable, index: int, *, seed: int, seq_length: int, too_long: str) -> None:
        """Prepare the stream; nothing is shuffled yet.

        Args:
            source: The source.
            index: Of the source in the mixture.
            seed: Of the order of samples.
            seq_length: Tokens per sequence; longer samples are split, truncated or not used.
            too_long: `refuse`, `truncate` or `split`: see `Plan`.

        Raises:
            DataError: The source has no samples, or none that fits a sequence.
        """
        self.source, self._index, self._seq_length, self._too_long = source, index, seq_length, too_long
        lengths = np.asarray(source.lengths, np.int64)
        fits = (lengths <= seq_length) | source.is_text
        if not len(lengths):
            raise DataError(
                f"source {source.label!r} has no samples: look for the reasons in its rejected.jsonl, or remove the "
                "source from data.sources"
            )
        if too_long == "refuse" and not fits.any():
            raise DataError(
                f"source {source.label!r} has no sample that fits train.seq_length {seq_length} (its shortest of "
                f"{len(lengths)} has {lengths.min()} tokens): raise train.seq_length, or lower "
                "data.image_max_tokens or data.video_max_tokens"
            )
        longest = {"refuse": 0, "truncate": seq_length, "split": np.iinfo(np.int64).max}[too_long]
        self.mean_length = max(float(np.where(fits, lengths, np.minimum(lengths, longest)).mean()), 1.0)
        self.samples = max(1, round(source.epochs * len(lengths))) if source.epochs else None
        self._shuffle = Shuffle(source.shard_rows, seed=seed, name=source.label)

    def remaining(self, number: int) -> float:
        """Return how many samples there are from sample `number` on; infinity if the stream is endless."""
        return float("inf") if self.samples is None else max(self.samples - number, 0)

    def check_unusable(self, samples: int) -> None:
        """Raise DataError if `samples` samples in a row without a piece must include a whole epoch."""
        if samples >= 2 * self._shuffle.epoch_length - 1:
            raise DataError(
                f"no sample of source {self.source.label!r} can be cut to train.seq_length {self._seq_length}: raise "
                "train.seq_length, or lower data.image_max_tokens or data.video_max_tokens"
            )

    def take(self, number: int, count: int) -> Pieces:
        """Return all pieces of samples number, number + 1 ... number + count - 1 of the stream."""
        rows = self._shuffle.rows(number, count)
        length = self.source.lengths[rows].astype(np.int64)
        fits = length <= self._seq_length
        whole = Pieces(
            source=np.full(count, self._index),
            number=np.arange(number, number + count),
            index=np.zeros(count, np.int64),
            is_last=np.ones(count, bool),
            row=rows,
            start=np.zeros(count, np.int64),
            length=length,
            patches=self.source.patches[rows].astype(np.int64),
            patches_squared=self.source.patches_squared[rows].astype(np.int64),
        )
        return whole if fits.all() else self._cut(whole, fits)

    def _cut(self, whole: Pieces, fits: np.ndarray) -> Pieces:
        """Replace the samples that do not fit by their pieces. Long texts are many and simple, the others few."""
        is_text = self.source.is_text[whole.row]
        counts = np.where(is_text, -(-whole.length // self._seq_length), 1)
        cuts = {}
        for sample in np.flatnonzero(~fits & ~is_text).tolist():
            cuts[sample] = self._cut_with_images(int(whole.row[sample]), int(whole.length[sample]))
            counts[sample] = max(len(cuts[sample]), 1)
        of_sample = np.repeat(np.arange(len(whole)), counts)
        first = np.cumsum(counts) - counts
        pieces = whole[of_sample]
        pieces.index[:] = np.arange(len(of_sample)) - first[of_sample]
        pieces.is_last[:-1] = pieces.index[1:] == 0
        pieces.start[:] = pieces.index * self._seq_length
        pieces.length[:] = np.minimum(pieces.length - pieces.start, self._seq_length)
        for sample, cut in cuts.items():
            begin = first[sample]
            pieces.length[begin] = 0
            for number, (start, length, share) in enumerate(cut, start=begin):
                pieces.start[number], pieces.length[number] = start, length
                pieces.patches[number] *= share
                pieces.patches_squared[number] *= share
        return pieces

    def _cut_with_images(self, row: int, length: int) -> list[tuple[int, int, float]]:
        """Return (start, length, share of the sample's images) of every piece; none if the sample is too long."""
        if self._too_long == "refuse" or (self._too_long == "split" and self.source.domain_of(row) == "chat"):
            return []
        blocks = list(self.source.blocks(row))
        pieces = cut_between_blocks(length, blocks, self._seq_length)
        if self._too_long == "truncate":
            pieces = pieces[:1]
        elif sum(n for _, n in pieces) < length:
            return []  # a block is longer than a sequence
        shares = [image_share(blocks, start, n) for start, n in pieces]
        if self._too_long == "truncate" and blocks and not any(shares):
            return []  # the truncated sample would have no image
        return [(start, n, share) for (start, n), share in zip(pieces, shares, strict=True)]


def cut_between_blocks(length: int, blocks: Sequence[tuple[int, int]], seq_length: int) -> list[tuple[int, int]]:
    """Cut a sample into the fewest pieces of at most seq_length tokens without cutting through a block.

    cut_between_blocks(10, [(3, 4)], 6)  ->  [(0, 3), (3, 6), (9, 1)]

    Args:
        length: Tokens of the sample.
        blocks: (start, length) of what must stay whole, in order.
        seq_length: Most tokens per piece.

    Returns:
        (start, length) of every piece. The pieces end before a block that is longer than a piece.
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
    """Return which share of a sample's images and videos, by tokens, is in the piece start..start+length."""
    inside = sum(size for at, size in blocks if start <= at < start + length)
    return inside / max(sum(size for _, size in blocks), 1)


class StreamPosition(NamedTuple):
    """How much of a source's stream has been used."""

    samples: int = 0  # used completely
    pieces: int = 0  # used of the next sample
    tokens: int = 0  # in total, for the blend


def blend(
    streams: Sequence[Stream], positions: Sequence[StreamPosition], max_tokens: int, multiple: int
) -> tuple[Pieces, bool]:
    """Return the next pieces of the blend, as many as fit into `max_tokens`.

    Args:
        streams: One per source.
        positions: Where each stream stands.
        max_tokens: Tokens available, padding included.
        multiple: Each piece is padded to a multiple of this.

    Returns:
        The pieces, and whether they are all that is left.

    Raises:
        DataError: No sample of a source can be cut to a sequence.
    """
    heads = [_Head(stream, position) for stream, position in zip(streams, positions, strict=True)]
    # The level is tokens / weight, equal for all live sources up to one piece. Raise it until there are enough tokens.
    level, missing = _mean_level(heads), float(max_tokens)
    while missing > 0 and (live := [head for head in heads if not head.ended]):
        level += missing / sum(head.weight for head in live)
        for head in live:
            head.take_up_to(level)
        missing = max_tokens - sum(head.padded_below(level, multiple) for head in heads)
    ended = missing > 0
    pieces = Pieces.join([head.pieces for head in heads])
    keys = np.concatenate([head.keys for head in heads])
    order = np.argsort(keys, kind="stable")
    if not ended:  # above the level, further pieces may follow that have not been taken yet
        order = order[: np.searchsorted(keys[order], level)]
    pieces = pieces[order]
    used = np.cumsum(padded(pieces.length, multiple))
    fitting = int(np.searchsorted(used, max_tokens, side="right"))
    return pieces[:fitting], ended and fitting == len(pieces)


def _mean_level(heads: Sequence[_Head]) -> float:
    live = [head for head in heads if not head.ended]
    return sum(head.start.tokens for head in live) / sum(head.weight for head in live) if live else 0.0


class _Head:
    """The next pieces of one stream, as many as have been taken so far."""

    def __init__(self, stream: Stream, start: StreamPosition) -> None:
        self.stream, self.start, self.weight = stream, start, stream.source.weight
        self.pieces = stream.take(start.samples, 0)
        self.keys = np.empty(0)  # float64 [pieces]: tokens / weight before each
        self._number, self._tokens = start.samples, start.tokens

    @property
    def ended(self) -> bool:
        return not self.stream.remaining(self._number)

    def take_up_to(self, level: float) -> None:
        """Take samples until tokens / weight reaches the level or the stream ends."""
        wanted = level * self.weight
        unusable = 0
        while self._tokens < wanted and not self.ended:
            guess = 16 + int((wanted - self._tokens) / self.stream.mean_length)
            count = int(min(guess, self.stream.remaining(self._number)))
            new = self.stream.take(self._number, count)
            new = new[(new.number > self.start.samples) | (new.index >= self.start.pieces)]
            before = self._tokens + np.cumsum(new.length) - new.length
            self.pieces = Pieces.join([self.pieces, new])
            self.keys = np.concatenate([self.keys, before / self.weight])
            self._number += count
            self._tokens += int(new.length.sum())
            unusable = 0 if new.length.any() else unusable + count
            self.stream.check_unusable(unusable)

    def padded_below(self, level: float, multiple: int) -> int:
        return int(padded(self.pieces.length[: np.searchsorted(self.keys, level)], multiple).sum())


def positions_after(positions: Sequence[StreamPosition], used: Pieces) -> tuple[StreamPosition, ...]:
    """Return where the streams stand after these pieces, which begin at `positions`, have been used."""
    newest = np.full(len(positions), -1)
    newest[used.source] = np.arange(len(used))  # of several pieces of a source the last one stays
    tokens = np.bincount(used.source, used.length, len(positions)).astype(np.int64)
    after = list(positions)
    for source in np.flatnonzero(newest >= 0).tolist():
        number, index, last = (int(column[newest[source]]) for column in (used.number, used.index, used.is_last))
        samples, pieces = (number + 1, 0) if last else (number, index + 1)
        after[source] = StreamPosition(samples, pieces, positions[source].tokens + int(tokens[source]))
    return tuple(after)


def padded(length: np.ndarray, multiple: int) -> np.ndarray:
    """Return int [pieces]: the lengths, each rounded up to a multiple of `multiple`."""
    return -(-length // multiple) * multiple
