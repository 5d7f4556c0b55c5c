"""Filters of samples that are also in a benchmark: its word sequences, and its images.

Benchmarks are files in JSON lines, Parquet or plain text (one entry per line). Every string in them is a text. Images
are bytes (as Hugging Face stores them in Parquet), or paths of image files, relative to the benchmark's file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.curation.candidate import Candidate, perceptual_hash
from data_pipeline.curation.filters import Filter, Filtered
from data_pipeline.curation.hashing import hash64, mixed
from data_pipeline.curation.texts import words_of
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.image_files import decode_image
from data_pipeline.shards.members import IMAGE_EXTENSIONS


@dataclass
class ContaminatedTexts(Filter):
    """`contaminated_text`: the text has a sequence of `words` words in common with a benchmark.

    Case and punctuation are ignored, as in the check of GPT-3 (Brown et al. 2020, appendix C). A benchmark's text with
    fewer words must occur completely.
    """

    files: list[str] = field(default_factory=list)  # of benchmarks
    words: int = 13  # per sequence
    min_words: int = 8  # texts of a benchmark with fewer words are too common to compare

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        _check_files("contaminated_texts", self.files)
        if not 1 <= self.min_words <= self.words:
            raise DataError("contaminated_texts: words must be at least min_words, and both positive")
        if not self._sequences:
            raise DataError(f"contaminated_texts.files: no text in them has {self.min_words} words or more")

    @cached_property
    def _sequences(self) -> dict[int, np.ndarray]:
        """Number of words -> the sorted hashes of the benchmarks' sequences of that many words, uint64 [n]."""
        sequences: dict[int, list[np.ndarray]] = {}
        for file in self.files:
            for _, value in benchmark_values(Path(file)):
                hashes = word_hashes(value) if isinstance(value, str) else np.empty(0)
                if len(hashes) >= self.min_words:
                    length = min(len(hashes), self.words)
                    sequences.setdefault(length, []).append(sequence_hashes(hashes, length))
        return {length: np.unique(np.concatenate(found)) for length, found in sorted(sequences.items())}

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        hashes = word_hashes(sample.text)
        for length, known in self._sequences.items():
            if length > len(hashes):
                break
            own = sequence_hashes(hashes, length)
            candidates = np.searchsorted(known, own).clip(max=len(known) - 1)
            found = np.flatnonzero(known[candidates] == own)
            if len(found):
                words = words_of(sample.text)[found[0] : found[0] + length]
                return Filtered("contaminated_text", f"{len(found)} word sequences, such as {' '.join(words)!r}")
        return None


@dataclass
class ContaminatedImages(Filter):
    """`contaminated_image`: the perceptual hash of an image is near that of a benchmark's image."""

    files: list[str] = field(default_factory=list)  # of benchmarks
    distance: int = 4  # bits, of 64, in which the hashes may differ

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        _check_files("contaminated_images", self.files)
        if not len(self._known[0]):
            raise DataError("contaminated_images.files: they contain no images")

    @cached_property
    def _known(self) -> tuple[np.ndarray, list[str]]:
        """The hashes of the benchmarks' images, uint64 [n], and the name of each."""
        hashes, names = [], []
        for file in self.files:
            for name, value in benchmark_values(Path(file)):
                if (data := _image_bytes(value, Path(file).parent)) is not None:
                    try:
                        hashes.append(perceptual_hash(decode_image(data)))
                    except BadSample as error:
                        raise DataError(f"contaminated_images.files: {name}: {error}") from error
                    names.append(name)
        return np.array(hashes, np.uint64), names

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        known, names = self._known
        for value in sample.image_hashes:
            distances = np.bitwise_count(known ^ np.uint64(value))
            nearest = int(distances.argmin())
            if distances[nearest] <= self.distance:
                return Filtered("contaminated_image", f"{distances[nearest]} bits from {names[nearest]}")
        return None


def word_hashes(text: str) -> np.ndarray:
    """Return the hash of each word of a text: uint64 [words]."""
    return np.array([hash64(word) for word in words_of(text)], np.uint64)


def sequence_hashes(hashes: np.ndarray, length: int) -> np.ndarray:
    """Return the hash of each sequence of `length` words, from hashes of words [n]: uint64 [n - length + 1]."""
    return mixed(np.lib.stride_tricks.sliding_window_view(hashes, length))


def benchmark_values(file: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield (FILE:ENTRY, value) of every string and bytes value in a benchmark's file.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        for number, entry in enumerate(_READERS[file.suffix](file), start=1):
            for value in _leaves(entry):
                yield f"{file.name}:{number}", value
    except (OSError, ValueError, RecursionError) as error:  # JSON, UTF-8 and Arrow errors are ValueErrors
        raise DataError(f"{file} cannot be read ({error}): fix the file") from error


def _json_lines(file: Path) -> Iterator[Any]:
    with open(file, encoding="utf-8-sig") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _parquet(file: Path) -> Iterator[Any]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _lines(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8-sig") as lines:
        yield from lines


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {".jsonl": _json_lines, ".parquet": _parquet, ".txt": _lines}


def _leaves(value: Any) -> Iterator[str | bytes]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str | bytes):
        yield value


def _image_bytes(value: str | bytes, folder: Path) -> bytes | None:
    if isinstance(value, bytes):
        return value
    if value.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and len(value) < 1024 and (folder / value).is_file():
        return (folder / value).read_bytes()
    return None


def _check_files(name: str, files: list[str]) -> None:
    if not files:
        raise DataError(f"{name}.files is empty: list the files of benchmarks")
    for file in files:
        if Path(file).suffix not in _READERS or not Path(file).is_file():
            raise DataError(f"{name}.files: {file} is not a file that ends in {', '.join(_READERS)}")
