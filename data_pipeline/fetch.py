"""Fetching a pack: reads, decodes and collates the samples that the plan names. Runs in the data workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from data_pipeline.batch import Batch, EncodedSample, collate
from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.errors import BadSample, DataError
from data_pipeline.index import Source
from data_pipeline.plan import Pack, Piece
from data_pipeline.shards import ShardReader, ShardSample
from data_pipeline.tokens import GlmTokenizer


@dataclass(frozen=True)
class PieceOrder:
    """All a worker needs to fetch one piece without an index. sample_length: tokens the index promises."""

    shard: str
    shard_name: str
    sample: ShardSample
    chat_form: str
    tar_fingerprint: str
    sample_length: int
    start: int
    length: int


@dataclass(frozen=True)
class PackOrder:
    """A pack to fetch, and what the plan has set aside already."""

    pieces: list[PieceOrder]
    rejected: list[dict[str, Any]]


@dataclass(frozen=True)
class Failure:
    """A worker's way to report that the data as a whole is unusable, without a stack trace."""

    message: str


def order(pack: Pack, sources: Sequence[Source], seq_length: int) -> PackOrder:
    """Looks up where the pieces of a pack lie."""

    def piece_order(piece: Piece) -> PieceOrder:
        source = sources[piece.source]
        stored = source.sample(piece.row)
        return PieceOrder(
            shard=stored.shard,
            shard_name=stored.shard_name,
            sample=stored.sample,
            chat_form=stored.chat_form,
            tar_fingerprint=stored.tar_fingerprint,
            sample_length=int(source.lengths[piece.row]),
            start=piece.start,
            length=piece.length,
        )

    rejected = []
    for piece in pack.too_long:
        lost = piece_order(piece)
        detail = f"{lost.sample_length} tokens do not fit train.seq_length {seq_length}"
        rejected.append({"reason": "too_long", "shard": lost.shard_name, "key": lost.sample.key, "detail": detail})
    return PackOrder([piece_order(piece) for piece in pack.pieces], rejected)


class PackFetcher(Dataset):
    """Maps a PackOrder to its Batch. Bad samples leave their room as padding and are named in Batch.rejected."""

    def __init__(self, tokenizer: GlmTokenizer, budget: PixelBudget, *, seq_length: int, segment_multiple: int):
        self.tokenizer, self.budget = tokenizer, budget
        self.seq_length, self.segment_multiple = seq_length, segment_multiple
        self._reader = ShardReader()
        self._last_cut: tuple[tuple[str, str], EncodedSample] | None = None  # pieces of one text come close together

    def __getitem__(self, pack: PackOrder) -> Batch | Failure:
        samples: list[EncodedSample] = []
        rejected = list(pack.rejected)
        for piece in pack.pieces:
            try:
                samples.append(self._fetch(piece))
            except BadSample as error:
                where = {"shard": piece.shard_name, "key": piece.sample.key}
                rejected.append({"reason": error.reason, **where, "detail": error.detail})
            except DataError as error:
                return Failure(str(error))
        return collate(
            samples,
            seq_length=self.seq_length,
            segment_multiple=self.segment_multiple,
            pad_id=self.tokenizer.pad_id,
            rejected=rejected,
        )

    def _fetch(self, piece: PieceOrder) -> EncodedSample:
        place = (piece.shard, piece.sample.key)
        if self._last_cut is not None and self._last_cut[0] == place:
            return cut_text(self._last_cut[1], piece.start, piece.length)
        raw = self._reader.read(piece.shard, piece.sample, piece.tar_fingerprint)
        encoded = encode_record(
            *(raw.record, raw.images, raw.videos),
            tokenizer=self.tokenizer,
            budget=self.budget,
            sample_id=f"{piece.shard_name}/{piece.sample.key}",
            chat_form=piece.chat_form,
        )
        if len(encoded) != piece.sample_length:
            raise BadSample("length_changed", f"{len(encoded)} tokens, but the index promised {piece.sample_length}")
        if piece.length < len(encoded):
            self._last_cut = (place, encoded)
        return cut_text(encoded, piece.start, piece.length)


def cut_text(sample: EncodedSample, start: int, length: int) -> EncodedSample:
    """Part of a sample without images, with positions from 0; the sample itself if that is all of it."""
    if length == len(sample):
        return sample
    return replace(
        sample,
        input_ids=sample.input_ids[start : start + length],
        loss=sample.loss[start : start + length],
        position_ids=sample.position_ids[:, :length],
        pixels=torch.empty_like(sample.pixels),
    )
