"""The demo's records: usable, with valid boxes, and with held-out media that training never sees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.domains import build_sample
from data_pipeline.media.boxes import is_valid_box, written_boxes
from demo.records import Library, sources
from demo.texts import docstrings, documents, sentences, summaries

Records = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def records(media: Path) -> Records:
    return {name: list(each) for name, each in sources(Library(media)).items()}


def files(record: dict[str, Any]) -> Iterator[str]:
    yield from record.get("images", ())
    yield from record.get("videos", ())


def test_every_record_builds_a_sample(records: Records) -> None:
    for record in (record for each in records.values() for record in each):
        build_sample(record, images=len(record.get("images", ())), videos=len(record.get("videos", ())))


def test_held_out_sources_share_no_media_with_training(records: Records, media: Path) -> None:
    seen: dict[bool, set[bytes]] = {True: set(), False: set()}
    for name, each in records.items():
        seen[name.startswith("held_out")] |= {(media / file).read_bytes() for record in each for file in files(record)}
    assert seen[True]
    assert not seen[True] & seen[False]


def test_rendered_sentences_are_held_out_too(records: Records) -> None:
    held_out, train = ({record["text"].replace("\n", " ") for record in records[n]} for n in ("held_out_ocr", "ocr"))
    assert held_out
    assert not held_out & train


def test_boxes_are_valid(records: Records) -> None:
    boxes = [box for record in records["grounding"] for _, box in written_boxes(record["text"])]
    assert len(boxes) == 2 * len(records["grounding"])
    assert [box for box in boxes if not is_valid_box(box)] == []


def test_questions_have_one_answer_and_their_neighbours_another(records: Records) -> None:
    """The control shows each question the next one's image, whose name must be wrong."""
    for name in ("held_out_name", "held_out_describe"):
        answers = [record["messages"][1]["content"] for record in records[name]]
        assert len(answers) >= 40
        assert all(answer != following for answer, following in pairwise([*answers, answers[0]]))


@pytest.mark.fast
def test_documents_are_whole_paragraphs_of_the_docstrings() -> None:
    paragraphs = {part.strip("\n") for text in docstrings().values() for part in text.split("\n\n")}
    made = list(documents())
    assert len(made) > 500
    assert {part.strip("\n") for document in made for part in document.split("\n\n")} <= paragraphs | {""}


@pytest.mark.fast
def test_sentences_and_summaries_end_as_sentences_do() -> None:
    assert len(sentences()) > 200
    assert len(summaries()) > 200
    for text in (*sentences(), *summaries().values()):
        assert re.fullmatch(r"[A-Z].*\.", text)
