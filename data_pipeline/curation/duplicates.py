"""Filters of samples that repeat earlier ones: images, texts, and videos with their captions.

Of samples that repeat each other the first one is kept. A sample with several images is filtered only if each of them
repeats an image of an earlier sample that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasketch import MinHash

from data_pipeline.curation.buckets import bucket_numbers, first_of_bucket, hamming_tables, repeats_of
from data_pipeline.curation.candidate import Candidate, perceptual_hash
from data_pipeline.curation.filters import Filtered, RemainingSamples, SetFilter
from data_pipeline.curation.hashing import digest, mixed
from data_pipeline.curation.texts import words_of
from data_pipeline.errors import DataError

_DIGEST = np.dtype("S16")
MAX_DISTANCE = 16  # bits of 64; unrelated images differ in about 32


@dataclass
class ExactDuplicateImages(SetFilter):
    """`duplicate_image`: the same pixels, or the same file."""

    of: str = "pixels"  # pixels: the same in any file format; bytes: the same file
    feature_type: ClassVar = pa.list_(pa.binary(16))

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        if self.of not in ("pixels", "bytes"):
            raise DataError(f"exact_duplicate_images.of is {self.of!r}: give pixels or bytes")

    def feature(self, sample: Candidate) -> list[bytes] | None:
        """Return a digest per image."""
        if self.of == "bytes":
            return [digest(data) for data in sample.images] or None
        return [digest(repr(pixels.shape).encode(), pixels.tobytes()) for pixels in sample.pixels] or None

    def decide(self, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
        """Yield the rows to filter, with reasons."""
        owners, digests = _flat(samples)
        yield from _repeated(repeats_of(owners, [bucket_numbers(digests)], first_of_bucket), "duplicate_image", samples)


@dataclass
class NearDuplicateImages(SetFilter):
    """`near_duplicate_image`: perceptual hashes that are nearly equal.

    This finds images that were saved again, resized or slightly changed, but not cropped, rotated or mirrored ones.
    """

    distance: int = 4  # bits, of 64, in which the hashes may differ
    feature_type: ClassVar = pa.list_(pa.uint64())

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        _check_distance("near_duplicate_images", self.distance)

    def feature(self, sample: Candidate) -> list[int] | None:
        """Return a perceptual hash per image."""
        return sample.image_hashes or None

    def decide(self, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
        """Yield the rows to filter, with reasons."""
        owners, hashes = _flat(samples)

        def first_similar(item: int, others: list[int]) -> int | None:
            similar = np.bitwise_count(hashes[others] ^ hashes[item]) <= self.distance
            return others[int(similar.argmax())] if similar.any() else None

        found = repeats_of(owners, hamming_tables(hashes, self.distance), first_similar)
        yield from _repeated(found, "near_duplicate_image", samples)


@dataclass
class ExactDuplicateTexts(SetFilter):
    """`duplicate_text`: the same words in the same order. Case and punctuation are ignored."""

    feature_type: ClassVar = pa.binary(16)

    def feature(self, sample: Candidate) -> bytes | None:
        """Return a digest of the words."""
        words = words_of(sample.text)
        return digest(" ".join(words).encode()) if words else None

    def decide(self, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
        """Yield the rows to filter, with reasons."""
        owners, digests = _one_each(samples)
        yield from _repeated(repeats_of(owners, [bucket_numbers(digests)], first_of_bucket), "duplicate_text", samples)


@dataclass
class NearDuplicateTexts(SetFilter):
    """`near_duplicate_text`: of the word sequences of both texts, at least a share `similarity` is in both.

    MinHash proposes pairs: 99 in 100 of those exactly at the limit, and nearly all that are more similar. Both texts
    are then read and compared, so that no sample is filtered by chance.
    """

    similarity: float = 0.8  # Jaccard's
    words: int = 5  # per sequence
    permutations: int = 128  # hashes per MinHash signature
    seed: int = 1  # of the hashes
    feature_type: ClassVar = pa.binary()

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        if not 0 < self.similarity <= 1:
            raise DataError(f"near_duplicate_texts.similarity is {self.similarity}: give more than 0 and at most 1")
        for option in ("words", "permutations"):
            if getattr(self, option) < 1:
                raise DataError(f"near_duplicate_texts.{option} is {getattr(self, option)}: give 1 or more")

    @cached_property
    def _empty(self) -> MinHash:
        return MinHash(self.permutations, self.seed, scheme="affine32")

    def feature(self, sample: Candidate) -> bytes | None:
        """Return the MinHash signature: little-endian uint32 [permutations]."""
        sequences = word_sequences(sample.text, self.words)
        if not sequences:
            return None
        signature = self._empty.copy()
        signature.update_batch(sequence.encode() for sequence in sorted(sequences))
        return signature.hashvalues.astype("<u4").tobytes()

    def decide(self, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
        """Yield the rows to filter, with reasons."""
        rows_in_band = band_rows(self.similarity, self.permutations)
        bands = self.permutations // rows_in_band
        owners, keys = [np.empty(0, np.int64)], [np.empty((0, bands), np.uint64)]
        for rows, signatures in samples.chunks():
            values = np.frombuffer(b"".join(signatures.to_pylist()), "<u4").reshape(len(rows), self.permutations)
            owners.append(rows)
            keys.append(mixed(values[:, : bands * rows_in_band].reshape(len(rows), bands, rows_in_band)))
        tables = [bucket_numbers(key) for key in np.concatenate(keys).T]
        rows = np.concatenate(owners)

        sequences = lru_cache(maxsize=4096)(lambda item: word_sequences(samples.text(int(rows[item])), self.words))

        def first_similar(item: int, others: list[int]) -> int | None:
            own = sequences(item)
            return next((other for other in others if jaccard(own, sequences(other)) >= self.similarity), None)

        yield from _repeated(repeats_of(rows, tables, first_similar), "near_duplicate_text", samples)


@dataclass
class DuplicateVideoPairs(SetFilter):
    """`duplicate_video`: the same video with the same words. Case and punctuation are ignored.

    Videos are the same if the perceptual hashes of `frames` evenly spaced frames are nearly equal, pair by pair. One
    video with two captions is kept twice, and so is one caption of two videos.
    """

    distance: int = 6  # bits, of 64, in which the hashes of two frames may differ
    frames: int = 8  # that are compared
    feature_type: ClassVar = pa.struct([("words", pa.binary(16)), ("hashes", pa.list_(pa.uint64()))])

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        _check_distance("duplicate_video_pairs", self.distance)
        if self.frames < 1:
            raise DataError(f"duplicate_video_pairs.frames is {self.frames}: give 1 or more")

    def feature(self, sample: Candidate) -> dict[str, Any] | None:
        """Return a digest of the words, and the hashes of the frames."""
        if not sample.videos:
            return None
        hashes = []
        for video in sample.thumbnails:
            chosen = np.linspace(0, len(video.frames) - 1, self.frames).round().astype(int)
            hashes += [perceptual_hash(video.frames[index]) for index in chosen]
        return {"words": digest(" ".join(words_of(sample.text)).encode()), "hashes": hashes}

    def decide(self, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
        """Yield the rows to filter, with reasons."""
        rows, words, hashes = [], [], []
        for chunk_rows, features in samples.chunks():
            rows += chunk_rows.tolist()
            words += features.field("words").to_pylist()
            hashes += [np.array(values, np.uint64) for values in features.field("hashes").to_pylist()]

        def similar(first: np.ndarray, second: np.ndarray) -> bool:
            return len(first) == len(second) and bool((np.bitwise_count(first ^ second) <= self.distance).all())

        def first_similar(item: int, others: list[int]) -> int | None:
            return next((other for other in others if similar(hashes[item], hashes[other])), None)

        tables = [bucket_numbers(np.array(words, _DIGEST))]
        yield from _repeated(repeats_of(np.array(rows, np.int64), tables, first_similar), "duplicate_video", samples)


def word_sequences(text: str, words: int) -> frozenset[str]:
    """Return all sequences of `words` words in a text; the whole text if it has fewer."""
    all_words = words_of(text)
    if not all_words:
        return frozenset()
    return frozenset(" ".join(all_words[start : start + words]) for start in range(max(len(all_words) - words + 1, 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets that are not both empty."""
    return len(first & second) / len(first | second)


def band_rows(similarity: float, permutations: int) -> int:
    """Return how many hashes of a signature make one band.

    It is the largest number, which gives the fewest false candidates, at which two texts exactly as similar as
    `similarity` share a band 99 times in 100. 0.8 and 128 permutations give 6, so 21 bands.
    """
    misses = [(1 - similarity**rows) ** (permutations // rows) for rows in range(1, permutations + 1)]
    return max((rows for rows, miss in enumerate(misses, start=1) if miss <= 0.01), default=1)


def _flat(samples: RemainingSamples) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of every item, int64 [items], and the items, of features that are lists."""
    rows, items = [np.empty(0, np.int64)], []
    for chunk_rows, features in samples.chunks():
        rows.append(np.repeat(chunk_rows, features.value_lengths().to_numpy(zero_copy_only=False)))
        items.append(_numpy(features.flatten()))
    return np.concatenate(rows), np.concatenate(items) if items else np.empty(0, np.uint64)


def _one_each(samples: RemainingSamples) -> tuple[np.ndarray, np.ndarray]:
    """Return rows, int64 [items], and their features."""
    chunks = [(rows, _numpy(features)) for rows, features in samples.chunks()]
    if not chunks:
        return np.empty(0, np.int64), np.empty(0, _DIGEST)
    return np.concatenate([rows for rows, _ in chunks]), np.concatenate([values for _, values in chunks])


def _numpy(values: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_binary(values.type):
        return np.array(values.to_pylist(), _DIGEST)
    return values.to_numpy()


def _repeated(found: dict[int, int], reason: str, samples: RemainingSamples) -> Iterator[tuple[int, Filtered]]:
    for row, original in found.items():
        yield row, Filtered(reason, f"repeats {samples.name(original)}")


def _check_distance(name: str, distance: int) -> None:
    if not 0 <= distance <= MAX_DISTANCE:
        raise DataError(f"{name}.distance is {distance}: give 0 to {MAX_DISTANCE} bits")
