"""Filters of samples that a benchmark holds too: runs of its words, and its pictures.

Benchmarks are files that their users have: JSON lines, Parquet or plain text (an entry a line). Every string in them
counts as a text, every picture in them as a picture: bytes (as Hugging Face stores them in Parquet), or the path of a
picture, relative to the file.
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
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.curation.hashing import hash64, mixed
from data_pipeline.curation.texts import words_of
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.images import decode_image
from data_pipeline.shards.members import IMAGE_EXTENSIONS


@dataclass
class ContaminatedTexts(Filter):
    """`contaminated_text`: the text shares a run of `words` words with a benchmark, case and punctuation aside, as
    GPT-3 was checked (Brown et al. 2020, appendix C). Texts of a benchmark with fewer words must be found whole; those
    with fewer than `min_words` are too common to say anything."""

    files: list[str] = field(default_factory=list)
    words: int = 13
    min_words: int = 8

    def check(self) -> None:
        _check_files("contaminated_texts", self.files)
        if not 1 <= self.min_words <= self.words:
            raise DataError("contaminated_texts: words must be min_words or more, and both positive")
        if not self._runs:
            raise DataError(f"contaminated_texts.files: no text in them has {self.min_words} words or more")

    @cached_property
    def _runs(self) -> dict[int, np.ndarray]:
        """Length of a run -> the hashes of the benchmarks' runs of that length, sorted uint64."""
        runs: dict[int, list[np.ndarray]] = {}
        for file in self.files:
            for _, value in benchmark_values(Path(file)):
                hashes = word_hashes(value) if isinstance(value, str) else np.empty(0)
                if len(hashes) >= self.min_words:
                    length = min(len(hashes), self.words)
                    runs.setdefault(length, []).append(run_hashes(hashes, length))
        return {length: np.unique(np.concatenate(found)) for length, found in sorted(runs.items())}

    def __call__(self, sample: Candidate) -> Drop | None:
        hashes = word_hashes(sample.text)
        for length, known in self._runs.items():
            if length > len(hashes):
                break
            met = run_hashes(hashes, length)
            places = np.searchsorted(known, met).clip(max=len(known) - 1)
            found = np.flatnonzero(known[places] == met)
            if len(found):
                words = words_of(sample.text)[found[0] : found[0] + length]
                return Drop("contaminated_text", f"{len(found)} runs of words, such as {' '.join(words)!r}")
        return None


@dataclass
class ContaminatedPictures(Filter):
    """`contaminated_picture`: a picture whose perceptual hash differs from that of a benchmark's in at most `distance`
    of 64 bits."""

    files: list[str] = field(default_factory=list)
    distance: int = 4

    def check(self) -> None:
        _check_files("contaminated_pictures", self.files)
        if not len(self._known[0]):
            raise DataError("contaminated_pictures.files: there are no pictures in them")

    @cached_property
    def _known(self) -> tuple[np.ndarray, list[str]]:
        """The hashes of the benchmarks' pictures, uint64 [n], and where each is."""
        hashes, names = [], []
        for file in self.files:
            for name, value in benchmark_values(Path(file)):
                if (data := _picture_bytes(value, Path(file).parent)) is not None:
                    try:
                        hashes.append(perceptual_hash(decode_image(data)))
                    except BadSample as error:
                        raise DataError(f"contaminated_pictures.files: {name}: {error}") from error
                    names.append(name)
        return np.array(hashes, np.uint64), names

    def __call__(self, sample: Candidate) -> Drop | None:
        known, names = self._known
        for value in sample.picture_hashes:
            distances = np.bitwise_count(known ^ np.uint64(value))
            nearest = int(distances.argmin())
            if distances[nearest] <= self.distance:
                return Drop("contaminated_picture", f"{distances[nearest]} bits from {names[nearest]}")
        return None


def word_hashes(text: str) -> np.ndarray:
    """uint64 [words]."""
    return np.array([hash64(word) for word in words_of(text)], np.uint64)


def run_hashes(hashes: np.ndarray, length: int) -> np.ndarray:
    """Hashes of words [n] -> of all runs of so many of them, uint64 [n - length + 1]."""
    return mixed(np.lib.stride_tricks.sliding_window_view(hashes, length))


def benchmark_values(file: Path) -> Iterator[tuple[str, str | bytes]]:
    """(FILE:ENTRY, value) of every string and every bytes in a benchmark's file. Raises DataError."""
    try:
        for number, entry in enumerate(_READERS[file.suffix](file), start=1):
            for value in _leaves(entry):
                yield f"{file.name}:{number}", value
    except (OSError, ValueError, RecursionError) as error:  # JSON, UTF-8 and Arrow errors are ValueErrors
        raise DataError(f"{file} cannot be read ({error}): mend the file") from error


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


def _picture_bytes(value: str | bytes, folder: Path) -> bytes | None:
    if isinstance(value, bytes):
        return value
    if value.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and len(value) < 1024 and (folder / value).is_file():
        return (folder / value).read_bytes()
    return None


def _check_files(name: str, files: list[str]) -> None:
    if not files:
        raise DataError(f"{name}.files is empty: name the benchmark's files")
    for file in files:
        if Path(file).suffix not in _READERS or not Path(file).is_file():
            raise DataError(f"{name}.files: {file} is no file that ends in {', '.join(_READERS)}")
