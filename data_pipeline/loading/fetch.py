"""Fetching a pack: reads, decodes and collates the samples that the plan names. Runs in the data workers.

A worker holds the sources, so all it is told is a `Pack`: four integers a piece. What fails is replaced here, by the
rule of `quarantine`, and its replacement lies where it would have lain: the other samples of the pack stay in place.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from data_pipeline.domains import build_sample
from data_pipeline.encoding.batch import Batch, EncodedSample, collate, padded_length
from data_pipeline.encoding.encode import LongSample, encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample
from data_pipeline.loading.quarantine import TOO_LONG, Failure, quarantine_record, substitute
from data_pipeline.loading.source import Source, StoredSample
from data_pipeline.loading.workers import WorkerNotes
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.plan.plan import Pack, Piece
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.shard_cache import ShardCache

KEPT_LONG_SAMPLES = 4  # pieces of one sample come close together


class PackFetcher(Dataset):
    """Maps a Pack to its Batch. What could not be used is named in Batch.quarantined; nothing that is wrong with a file
    raises."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: GlmTokenizer,
        budget: PixelBudget,
        *,
        seq_length: int,
        segment_multiple: int,
        cache: ShardCache | None = None,
        notes: WorkerNotes | None = None,
    ):
        self.sources, self.tokenizer, self.budget = sources, tokenizer, budget
        self.seq_length, self.segment_multiple = seq_length, segment_multiple
        self._reader = ShardReader(cache=cache)
        self._notes = notes or WorkerNotes(workers=0)
        self._long: OrderedDict[tuple[int, int], LongSample] = OrderedDict()

    def __getitem__(self, pack: Pack) -> Batch:
        quarantined = [self._refused(piece) for piece in pack.too_long]
        samples, rooms = [], []
        for piece in pack.pieces:
            rooms.append(padded_length(piece.length, self.segment_multiple))
            samples.append(self._fetch_or_replace(piece, rooms[-1], quarantined))
        self._notes.write("")
        return collate(
            samples,
            seq_length=self.seq_length,
            segment_multiple=self.segment_multiple,
            pad_id=self.tokenizer.pad_id,
            segment_sizes=rooms,
            quarantined=quarantined,
        )

    def _fetch_or_replace(self, piece: Piece, room: int, quarantined: list[dict[str, Any]]) -> EncodedSample:
        """The piece, or what takes its place; what failed on the way is added to `quarantined`."""
        source = self.sources[piece.source]
        failures: list[Failure] = []
        records: list[dict[str, Any]] = []
        sample = EncodedSample.empty()
        candidate: Piece | None = piece
        while candidate is not None:
            stored = source.sample(candidate.row)
            try:
                sample = self._fetch(candidate, stored)
                break
            except BadSample as error:
                failures.append(Failure(candidate.row, error.reason))
                records.append(quarantine_record(error.reason, stored.shard_name, stored.sample.key, error.detail))
            row = substitute(source, room, self.segment_multiple, failures)
            candidate = None if row is None else Piece(piece.source, row, 0, int(source.lengths[row]))
        quarantined += [{**record, "replaced_by": sample.sample_id} for record in records]
        return sample

    def _refused(self, piece: Piece) -> dict[str, Any]:
        """The record of a sample that the plan has set aside."""
        stored = self.sources[piece.source].sample(piece.row)
        detail = f"{piece.length} tokens do not fit train.seq_length {self.seq_length}"
        return quarantine_record(TOO_LONG, stored.shard_name, stored.sample.key, detail)

    def _fetch(self, piece: Piece, stored: StoredSample) -> EncodedSample:
        """Raises BadSample, and nothing else, where the sample cannot be used."""
        self._notes.write(_sample_id(stored))
        try:
            if piece.length < self.sources[piece.source].lengths[piece.row]:
                return self._long_sample(piece, stored).piece(piece.start, piece.length)
            raw = self._reader.read(stored.shard, stored.sample, stored.tar_fingerprint)
            encoded = encode_record(
                *(raw.record, raw.images, raw.videos),
                tokenizer=self.tokenizer,
                budget=self.budget,
                sample_id=_sample_id(stored),
                chat_form=stored.chat_form,
            )
            self._check_length(piece, len(encoded))
            return encoded
        except BadSample:
            raise
        except (
            Exception
        ) as error:  # one sample that nobody foresaw must not end a run; many do, by the quarantine_record rate
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            raise BadSample("unexpected_error", f"{type(error).__name__} at {place}: {error}") from error

    def _long_sample(self, piece: Piece, stored: StoredSample) -> LongSample:
        place = (piece.source, piece.row)
        if place not in self._long:
            raw = self._reader.read(stored.shard, stored.sample, stored.tar_fingerprint)
            sample = build_sample(
                raw.record, images=len(raw.images), videos=len(raw.videos), chat_form=stored.chat_form
            )
            long = LongSample(
                *(sample, raw.images, raw.videos),
                tokenizer=self.tokenizer,
                budget=self.budget,
                sample_id=_sample_id(stored),
            )
            self._check_length(piece, len(long))
            self._long[place] = long
            if len(self._long) > KEPT_LONG_SAMPLES:
                self._long.popitem(last=False)
        self._long.move_to_end(place)
        return self._long[place]

    def _check_length(self, piece: Piece, length: int) -> None:
        promised = int(self.sources[piece.source].lengths[piece.row])
        if length != promised:
            raise BadSample("length_changed", f"{length} tokens, but the index promised {promised}")


def _sample_id(stored: StoredSample) -> str:
    return f"{stored.shard_name}/{stored.sample.key}"
