"""What a benchmark holds too, from JSON lines, Parquet and plain text."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.curation.contamination import ContaminatedPictures, ContaminatedTexts
from data_pipeline.errors import DataError
from tests.data_pipeline.curation.samples import candidate, file_of, photo

pytestmark = pytest.mark.fast

QUESTION = "Which of the two trains that left the old station at noon will reach the coast first on a day without wind?"
SHORT = "How many red boats lie in the harbour?"
TINY = "What is it?"


@pytest.fixture
def benchmark(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(file_of(photo("astronaut.png")))
    entries = [
        {"question": QUESTION, "options": ["the first", {"text": SHORT}], "image": "pictures/a.png", "id": 3},
        {"question": TINY, "image": "pictures/gone.png"},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8-sig")
    table = pa.table({"q": [QUESTION, TINY], "image": [{"bytes": file_of(photo("coffee.png")), "path": "x"}, None]})
    pq.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "b.txt").write_text(f"{SHORT}\n{TINY}\n")
    return {suffix: str(tmp_path / f"b.{suffix}") for suffix in ("jsonl", "parquet", "txt")}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_run_of_thirteen_words(benchmark: dict[str, str], suffix: str) -> None:
    step = ContaminatedTexts(files=[benchmark[suffix]])
    step.check()
    words = QUESTION.split()
    for start in range(len(words) - 12):
        run = " ".join(words[start : start + 13]).upper().replace(" ", " - ")
        verdict = step(candidate(f"Some words before, {run}! And after.", domain="text"))
        assert verdict is not None
        assert verdict.reason == "contaminated_text"
        assert " ".join(words[start : start + 13]).lower().rstrip("?") in verdict.detail
        assert step(candidate(" ".join(words[start : start + 12]), domain="text")) is None
    assert step(candidate(" ".join(reversed(words)))) is None


def test_shorter_texts_are_found_whole_and_the_shortest_not_at_all(benchmark: dict[str, str]) -> None:
    step = ContaminatedTexts(files=[benchmark["txt"]])
    assert step(candidate(f"Quiz: {SHORT} Three.")) is not None
    assert step(candidate(SHORT.replace("red", "blue"))) is None
    assert step(candidate(f"{TINY} A cat.")) is None
    assert ContaminatedTexts(files=[benchmark["txt"]], min_words=3)(candidate(f"{TINY} A cat.")) is not None


def test_pictures(benchmark: dict[str, str]) -> None:
    step = ContaminatedPictures(files=[benchmark["jsonl"], benchmark["parquet"]])
    step.check()
    for name, where in (("astronaut.png", "b.jsonl:1"), ("coffee.png", "b.parquet:1")):
        files = [file_of(photo("chelsea.png")), file_of(photo(name).resize((150, 100)), "JPEG")]
        verdict = step(candidate(images=files))
        assert verdict is not None
        assert verdict.reason == "contaminated_picture"
        assert verdict.detail.endswith(where)
    assert step(candidate(images=[file_of(photo("chelsea.png"))])) is None
    assert step(candidate("No picture.", domain="text")) is None


def test_files_that_say_nothing(benchmark: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for step, said in (
        (ContaminatedTexts(), "files is empty"),
        (ContaminatedTexts(files=["nowhere.jsonl"]), "nowhere.jsonl is no file"),
        (ContaminatedTexts(files=[str(tmp_path / "bad.jsonl")]), "cannot be read"),
        (ContaminatedTexts(files=[str(tmp_path / "deep.jsonl")]), "cannot be read"),
        (ContaminatedTexts(files=[benchmark["txt"]], min_words=9), "no text in them has 9 words"),
        (ContaminatedPictures(files=[benchmark["txt"]]), "there are no pictures"),
    ):
        with pytest.raises(DataError, match=said):
            step.check()
