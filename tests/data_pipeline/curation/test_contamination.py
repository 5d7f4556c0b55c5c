"""Samples that are also in a benchmark in JSON lines, Parquet or plain text."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.curation.contamination import ContaminatedImages, ContaminatedTexts
from data_pipeline.errors import DataError
from tests.data_pipeline.curation.samples import candidate, file_of, photo

pytestmark = pytest.mark.fast

QUESTION = "Which of the two trains that left the old station at noon will reach the coast first on a day without wind?"
SHORT = "How many red boats lie in the harbour?"
TINY = "What is it?"


@pytest.fixture
def benchmark(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(file_of(photo("astronaut.png")))
    entries = [
        {"question": QUESTION, "options": ["the first", {"text": SHORT}], "image": "images/a.png", "id": 3},
        {"question": TINY, "image": "images/missing.png"},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8-sig")
    table = pa.table({"q": [QUESTION, TINY], "image": [{"bytes": file_of(photo("coffee.png")), "path": "x"}, None]})
    pq.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "b.txt").write_text(f"{SHORT}\n{TINY}\n")
    return {suffix: str(tmp_path / f"b.{suffix}") for suffix in ("jsonl", "parquet", "txt")}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_sequence_of_thirteen_words_is_contaminated(benchmark: dict[str, str], suffix: str) -> None:
    step = ContaminatedTexts(files=[benchmark[suffix]])
    step.check()
    words = QUESTION.split()
    for start in range(len(words) - 12):
        sequence = " ".join(words[start : start + 13]).upper().replace(" ", " - ")
        verdict = step(candidate(f"Some words before, {sequence}! And after.", domain="text"))
        assert verdict is not None
        assert verdict.reason == "contaminated_text"
        assert " ".join(words[start : start + 13]).lower().rstrip("?") in verdict.detail
        assert step(candidate(" ".join(words[start : start + 12]), domain="text")) is None
    assert step(candidate(" ".join(reversed(words)))) is None


def test_short_texts_must_occur_completely_and_very_short_ones_are_ignored(benchmark: dict[str, str]) -> None:
    step = ContaminatedTexts(files=[benchmark["txt"]])
    assert step(candidate(f"Quiz: {SHORT} Three.")) is not None
    assert step(candidate(SHORT.replace("red", "blue"))) is None
    assert step(candidate(f"{TINY} A cat.")) is None
    assert ContaminatedTexts(files=[benchmark["txt"]], min_words=3)(candidate(f"{TINY} A cat.")) is not None


def test_images_near_those_of_a_benchmark_are_contaminated(benchmark: dict[str, str]) -> None:
    step = ContaminatedImages(files=[benchmark["jsonl"], benchmark["parquet"]])
    step.check()
    for name, where in (("astronaut.png", "b.jsonl:1"), ("coffee.png", "b.parquet:1")):
        files = [file_of(photo("chelsea.png")), file_of(photo(name).resize((150, 100)), "JPEG")]
        verdict = step(candidate(images=files))
        assert verdict is not None
        assert verdict.reason == "contaminated_image"
        assert verdict.detail.endswith(where)
    assert step(candidate(images=[file_of(photo("chelsea.png"))])) is None
    assert step(candidate("No image.", domain="text")) is None


def test_unusable_benchmarks_are_errors(benchmark: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for step, message in (
        (ContaminatedTexts(), "files is empty"),
        (ContaminatedTexts(files=["nowhere.jsonl"]), "nowhere.jsonl is not a file"),
        (ContaminatedTexts(files=[str(tmp_path / "bad.jsonl")]), "cannot be read"),
        (ContaminatedTexts(files=[str(tmp_path / "deep.jsonl")]), "cannot be read"),
        (ContaminatedTexts(files=[benchmark["txt"]], min_words=9), "no text in them has 9 words"),
        (ContaminatedImages(files=[benchmark["txt"]]), "contain no images"),
    ):
        with pytest.raises(DataError, match=message):
            step.check()
