"""Fetching a pack: read, decode and collate the samples that the plan names. Runs in the data workers.

A worker has opened the sources itself, so all that it receives is a `Pack`: four integers per piece. A sample that
fails is replaced here, by the rule of `quarantine`, in the segment that was planned for it. So the other samples of the
pack stay where they are.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from torch.utils.data import Dataset

from data_pipeline.domains import build_sample
from data_pipeline.encoding.batch import Batch, EncodedSample, collate, padded_length
from data_pipeline.encoding.encode import LongSample, encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError, Interrupted, LostShard, UnusedSample
from data_pipeline.loading.quarantine import TOO_LONG, Failure, substitute
from data_pipeline.loading.source import Source, StoredSample
from data_pipeline.loading.workers import WorkerNotes
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.plan.plan import Pack, Piece
from data_pipeline.shards.lost import LostShards
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.shard_cache import ShardCache

KEPT_LONG_SAMPLES = 4  # the pieces of a long sample are fetched shortly after each other


class PackFetcher(Dataset):
    """Maps a Pack to its Batch. Samples that cannot be used are listed in Batch.quarantined; bad files never raise.

    Where a shard is lost and the run must stop, the answer is the error: a raised one would arrive from the worker with
    its stack trace.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: GlmTokenizer,
        budget: PixelBudget,
        *,
        seq_length: int,
        segment_multiple: int,
        truncate: bool = False,
        cache: ShardCache | None = None,
        lost: LostShards | None = None,
        notes: WorkerNotes | None = None,
    ) -> None:
        """Prepare to fetch; no file is opened yet.

        Args:
            sources: The sources of the plan.
            tokenizer: Of the run.
            budget: Limits the size of images and videos.
            seq_length: Tokens per pack.
            segment_multiple: Segments are padded to a multiple of this many tokens.
            truncate: Whether only the beginning of a sample longer than a pack is used.
            cache: Where copies of remote shards are kept.
            lost: How long to wait for a shard that cannot be read, and whether one that stays lost is an error. By
                default its samples are quarantined at once.
            notes: Where this process notes which sample it is reading.
        """
        self.sources, self.tokenizer, self.budget = sources, tokenizer, budget
        self.seq_length, self.segment_multiple, self.truncate = seq_length, segment_multiple, truncate
        self._lost = lost or LostShards()
        self._reader = ShardReader(cache=cache, lost=self._lost)
        self._notes = notes or WorkerNotes(workers=0)
        self._long: OrderedDict[tuple[int, int], LongSample] = OrderedDict()

    def __getitem__(self, pack: Pack) -> Batch | DataError:
        try:
            return self._batch(pack)
        except DataError as error:
            return error

    def _batch(self, pack: Pack) -> Batch:
        quarantined = [self._too_long_record(piece).as_json() for piece in pack.too_long]
        samples, padded_lengths = [], []
        for piece in pack.pieces:
            space = padded_length(piece.length, self.segment_multiple)
            sample, unused = self._fetch_or_replace(piece, space)
            samples.append(sample)
            padded_lengths.append(space)
            quarantined += [record.as_json() for record in unused]
        self._notes.write("")
        return collate(
            samples,
            seq_length=self.seq_length,
            segment_multiple=self.segment_multiple,
            pad_id=self.tokenizer.pad_id,
            segment_sizes=padded_lengths,
            segment_sources=[self.sources[piece.source].label for piece in pack.pieces],
            quarantined=quarantined,
        )

    def _fetch_or_replace(self, piece: Piece, space: int) -> tuple[EncodedSample, list[UnusedSample]]:
        """Return the piece or its replacement, and the samples that failed before it."""
        source = self.sources[piece.source]
        failures: list[Failure] = []
        unused: list[UnusedSample] = []
        sample = EncodedSample.empty()
        candidate: Piece | None = piece
        while candidate is not None:
            stored = source.sample(candidate.row)
            try:
                sample = self._fetch(candidate, stored)
                break
            except BadSample as error:
                if isinstance(error, LostShard) and not self._lost.give_up:
                    raise DataError(
                        f"a shard of source {source.label!r} is lost: {error.detail}. Bring it back and start the run "
                        "again: it resumes from its newest checkpoint. data.retry_seconds is how long a run waits for "
                        "it; data.on_lost_shard=quarantine trains without its samples"
                    ) from error
                failures.append(Failure(candidate.row, error.reason))
                unused.append(UnusedSample(error.reason, error.detail, shard=stored.shard_name, key=stored.sample.key))
            row = substitute(source, space, self.segment_multiple, failures)
            candidate = None if row is None else Piece(piece.source, row, 0, int(source.lengths[row]))
        return sample, [replace(record, replaced_by=sample.sample_id) for record in unused]

    def _too_long_record(self, piece: Piece) -> UnusedSample:
        stored = self.sources[piece.source].sample(piece.row)
        detail = f"{piece.length} tokens do not fit train.seq_length {self.seq_length}"
        return UnusedSample(TOO_LONG, detail, shard=stored.shard_name, key=stored.sample.key, replaced_by="")

    def _fetch(self, piece: Piece, stored: StoredSample) -> EncodedSample:
        """Read and encode a piece. Raises BadSample, and nothing else, if the sample cannot be used."""
        self._notes.write(_sample_id(stored))
        try:
            if piece.length < self.sources[piece.source].lengths[piece.row]:
                return self._long_sample(piece, stored).piece(piece.start, piece.length, truncated=self.truncate)
            raw = self._reader.read(stored.shard, stored.sample, stored.tar_fingerprint)
            encoded = encode_record(
                raw.record,
                raw.images,
                raw.videos,
                tokenizer=self.tokenizer,
                budget=self.budget,
                sample_id=_sample_id(stored),
                chat_form=stored.chat_form,
            )
            self._check_length(piece, len(encoded))
            return encoded
        except (BadSample, Interrupted):
            raise
        except Exception as error:  # one unexpected sample must not end a run; many end it by the quarantined fraction
            where = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            raise BadSample("unexpected_error", f"{type(error).__name__} at {line}: {error}") from error

    def _long_sample(self, piece: Piece, stored: StoredSample) -> LongSample:
        key = (piece.source, piece.row)
        if key not in self._long:
            raw = self._reader.read(stored.shard, stored.sample, stored.tar_fingerprint)
            sample = build_sample(
                raw.record, images=len(raw.images), videos=len(raw.videos), chat_form=stored.chat_form
            )
            long = LongSample(
                sample,
                raw.images,
                raw.videos,
                tokenizer=self.tokenizer,
                budget=self.budget,
                sample_id=_sample_id(stored),
            )
            self._check_length(piece, len(long))
            self._long[key] = long
            if len(self._long) > KEPT_LONG_SAMPLES:
                self._long.popitem(last=False)
        self._long.move_to_end(key)
        return self._long[key]

    def _check_length(self, piece: Piece, length: int) -> None:
        promised = int(self.sources[piece.source].lengths[piece.row])
        if length != promised:
            raise BadSample("length_changed", f"{length} tokens, but the index says {promised}")


def _sample_id(stored: StoredSample) -> str:
    return f"{stored.shard_name}/{stored.sample.key}"
