"""Filters of samples that repeat earlier ones: pictures, texts, and clips with their captions.

The first of the samples that repeat each other stays. A sample with several pictures goes only if every one of them
repeats a picture of an earlier sample that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasketch import MinHash

from data_pipeline.curation.buckets import bucket_numbers, hamming_tables, repeats_of, sharing_is_enough
from data_pipeline.curation.candidate import Candidate, perceptual_hash
from data_pipeline.curation.filters import Drop, SetFilter, Survivors
from data_pipeline.curation.hashing import digest, mixed
from data_pipeline.curation.texts import words_of
from data_pipeline.errors import DataError

_DIGEST = np.dtype("S16")
MAX_DISTANCE = 16  # bits of 64; unrelated pictures differ in about 32


@dataclass
class ExactDuplicateImages(SetFilter):
    """`duplicate_image`: the same pixels, whatever the file format; or, of `bytes`, the same file."""

    of: str = "pixels"
    feature_type: ClassVar = pa.list_(pa.binary(16))

    def check(self) -> None:
        if self.of not in ("pixels", "bytes"):
            raise DataError(f"exact_duplicate_images.of is {self.of!r}: give pixels or bytes")

    def feature(self, sample: Candidate) -> list[bytes] | None:
        if self.of == "bytes":
            return [digest(data) for data in sample.images] or None
        return [digest(repr(picture.shape).encode(), picture.tobytes()) for picture in sample.pictures] or None

    def decide(self, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
        owners, digests = _flat(survivors)
        yield from _drops(
            repeats_of(owners, [bucket_numbers(digests)], sharing_is_enough), "duplicate_image", survivors
        )


@dataclass
class NearDuplicateImages(SetFilter):
    """`near_duplicate_image`: perceptual hashes that differ in at most `distance` of 64 bits. That finds pictures saved
    anew, resized or slightly changed; cropped, turned and mirrored ones it does not."""

    distance: int = 4
    feature_type: ClassVar = pa.list_(pa.uint64())

    def check(self) -> None:
        _check_distance("near_duplicate_images", self.distance)

    def feature(self, sample: Candidate) -> list[int] | None:
        return sample.picture_hashes or None

    def decide(self, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
        owners, hashes = _flat(survivors)

        def first_alike(item: int, others: list[int]) -> int | None:
            alike = np.bitwise_count(hashes[others] ^ hashes[item]) <= self.distance
            return others[int(alike.argmax())] if alike.any() else None

        found = repeats_of(owners, hamming_tables(hashes, self.distance), first_alike)
        yield from _drops(found, "near_duplicate_image", survivors)


@dataclass
class ExactDuplicateTexts(SetFilter):
    """`duplicate_text`: the same words in the same order, case and punctuation aside."""

    feature_type: ClassVar = pa.binary(16)

    def feature(self, sample: Candidate) -> bytes | None:
        words = words_of(sample.text)
        return digest(" ".join(words).encode()) if words else None

    def decide(self, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
        owners, digests = _one_each(survivors)
        yield from _drops(repeats_of(owners, [bucket_numbers(digests)], sharing_is_enough), "duplicate_text", survivors)


@dataclass
class NearDuplicateTexts(SetFilter):
    """`near_duplicate_text`: of the runs of `words` words that either text has, at least `similarity` are in both.

    MinHash proposes pairs (all but one in a hundred of those just at the limit, and hardly any that are more alike is
    missed); both texts are then read and compared, so that none goes by chance.
    """

    similarity: float = 0.8  # Jaccard's
    words: int = 5
    permutations: int = 128
    seed: int = 1
    feature_type: ClassVar = pa.binary()

    def check(self) -> None:
        if not 0 < self.similarity <= 1:
            raise DataError(f"near_duplicate_texts.similarity is {self.similarity}: give more than 0 and at most 1")
        for option in ("words", "permutations"):
            if getattr(self, option) < 1:
                raise DataError(f"near_duplicate_texts.{option} is {getattr(self, option)}: give 1 or more")

    @cached_property
    def _empty(self) -> MinHash:
        return MinHash(self.permutations, self.seed, scheme="affine32")

    def feature(self, sample: Candidate) -> bytes | None:
        runs = word_runs(sample.text, self.words)
        if not runs:
            return None
        signature = self._empty.copy()
        signature.update_batch(run.encode() for run in sorted(runs))
        return signature.hashvalues.astype("<u4").tobytes()

    def decide(self, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
        rows_in_band = band_rows(self.similarity, self.permutations)
        bands = self.permutations // rows_in_band
        owners, keys = [np.empty(0, np.int64)], [np.empty((0, bands), np.uint64)]
        for rows, signatures in survivors.chunks():
            values = np.frombuffer(b"".join(signatures.to_pylist()), "<u4").reshape(len(rows), self.permutations)
            owners.append(rows)
            keys.append(mixed(values[:, : bands * rows_in_band].reshape(len(rows), bands, rows_in_band)))
        tables = [bucket_numbers(key) for key in np.concatenate(keys).T]
        rows = np.concatenate(owners)

        runs = lru_cache(maxsize=4096)(lambda item: word_runs(survivors.text(int(rows[item])), self.words))

        def first_alike(item: int, others: list[int]) -> int | None:
            return next((other for other in others if jaccard(runs(item), runs(other)) >= self.similarity), None)

        yield from _drops(repeats_of(rows, tables, first_alike), "near_duplicate_text", survivors)


@dataclass
class DuplicateVideoPairs(SetFilter):
    """`duplicate_video`: the same clip with the same words. Clips are the same if each of `frames` frames, evenly
    spread, differs in at most `distance` of 64 bits of its perceptual hash; words, case and punctuation aside. One clip
    with two captions stays twice, and so does one caption of two clips."""

    distance: int = 6
    frames: int = 8
    feature_type: ClassVar = pa.struct([("words", pa.binary(16)), ("hashes", pa.list_(pa.uint64()))])

    def check(self) -> None:
        _check_distance("duplicate_video_pairs", self.distance)
        if self.frames < 1:
            raise DataError(f"duplicate_video_pairs.frames is {self.frames}: give 1 or more")

    def feature(self, sample: Candidate) -> dict[str, Any] | None:
        if not sample.videos:
            return None
        hashes = []
        for clip in sample.thumbnails:
            chosen = np.linspace(0, len(clip.frames) - 1, self.frames).round().astype(int)
            hashes += [perceptual_hash(clip.frames[index]) for index in chosen]
        return {"words": digest(" ".join(words_of(sample.text)).encode()), "hashes": hashes}

    def decide(self, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
        rows, words, hashes = [], [], []
        for chunk_rows, features in survivors.chunks():
            rows += chunk_rows.tolist()
            words += features.field("words").to_pylist()
            hashes += [np.array(values, np.uint64) for values in features.field("hashes").to_pylist()]

        def alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
            return len(ours) == len(theirs) and bool((np.bitwise_count(ours ^ theirs) <= self.distance).all())

        def first_alike(item: int, others: list[int]) -> int | None:
            return next((other for other in others if alike(hashes[item], hashes[other])), None)

        tables = [bucket_numbers(np.array(words, _DIGEST))]
        yield from _drops(repeats_of(np.array(rows, np.int64), tables, first_alike), "duplicate_video", survivors)


def word_runs(text: str, words: int) -> frozenset[str]:
    """All runs of so many words in a text; the whole text if it has fewer."""
    all_words = words_of(text)
    if not all_words:
        return frozenset()
    return frozenset(" ".join(all_words[start : start + words]) for start in range(max(len(all_words) - words + 1, 1)))


def jaccard(ours: frozenset[str], theirs: frozenset[str]) -> float:
    return len(ours & theirs) / len(ours | theirs)


def band_rows(similarity: float, permutations: int) -> int:
    """How many hashes of a signature make one band: the most, so the fewest false candidates, at which two texts just
    as alike as `similarity` still share a band 99 times in 100. 0.8 and 128: 6, so 21 bands."""
    misses = [(1 - similarity**rows) ** (permutations // rows) for rows in range(1, permutations + 1)]
    return max((rows for rows, miss in enumerate(misses, start=1) if miss <= 0.01), default=1)


def _flat(survivors: Survivors) -> tuple[np.ndarray, np.ndarray]:
    """Features that are lists -> (the row of every item, int64 [items]; the items)."""
    rows, items = [np.empty(0, np.int64)], []
    for chunk_rows, features in survivors.chunks():
        rows.append(np.repeat(chunk_rows, features.value_lengths().to_numpy(zero_copy_only=False)))
        items.append(_numpy(features.flatten()))
    return np.concatenate(rows), np.concatenate(items) if items else np.empty(0, np.uint64)


def _one_each(survivors: Survivors) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [items], their features)."""
    chunks = [(rows, _numpy(features)) for rows, features in survivors.chunks()]
    if not chunks:
        return np.empty(0, np.int64), np.empty(0, _DIGEST)
    return np.concatenate([rows for rows, _ in chunks]), np.concatenate([values for _, values in chunks])


def _numpy(values: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_binary(values.type):
        return np.array(values.to_pylist(), _DIGEST)
    return values.to_numpy()


def _drops(found: dict[int, int], reason: str, survivors: Survivors) -> Iterator[tuple[int, Drop]]:
    for row, original in found.items():
        yield row, Drop(reason, f"repeats {survivors.name(original)}")


def _check_distance(name: str, distance: int) -> None:
    if not 0 <= distance <= MAX_DISTANCE:
        raise DataError(f"{name}.distance is {distance}: give 0 to {MAX_DISTANCE} bits")
