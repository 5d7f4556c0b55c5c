"""Boxes: pixels to thousandths and back, bad boxes, boxes in texts."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest

from data_pipeline.errors import BadSample
from data_pipeline.media.boxes import (
    Box,
    bounding_box,
    checked_box,
    is_valid_box,
    read_box,
    to_pixels,
    to_thousandths,
    write_boxes,
    written_boxes,
)

pytestmark = pytest.mark.fast


def test_example_of_the_module() -> None:
    box = to_thousandths(read_box([50, 20, 500, 100], "xyxy", 500, 200), 500, 200)
    assert write_boxes([box]) == "[[100,100,999,500]]"


def test_coordinates_survive_writing_and_reading_to_half_a_step() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        width, height = rng.choice([1, 7, 28, 999, 1000, 1001, 4096, 30000]), rng.randint(1, 5000)
        whole = rng.random() < 0.5
        xs = sorted(rng.randint(0, width) if whole else rng.uniform(0, width) for _ in range(2))
        ys = sorted(rng.randint(0, height) if whole else rng.uniform(0, height) for _ in range(2))
        if xs[1] - xs[0] < width / 1000 or ys[1] - ys[0] < height / 1000:
            continue  # it may be thinner than a step
        box = checked_box((xs[0], ys[0], xs[1], ys[1]), width, height)
        written = to_thousandths(box, width, height)
        assert all(isinstance(value, int) and 0 <= value <= 999 for value in written)
        assert written[0] < written[2]
        assert written[1] < written[3]
        for value, restored, extent in zip(box, to_pixels(written, width, height), (width, height) * 2, strict=True):
            assert abs(value - restored) <= extent / 2000 * (1 + 1e-9)
        assert to_thousandths(to_pixels(written, width, height), width, height) == written


@pytest.mark.parametrize(
    ("values", "box_format", "pixels"),
    [
        ([10, 20, 30, 50], "xyxy", (10, 20, 30, 50)),
        ([10, 20, 30, 50], "xywh", (10, 20, 40, 70)),
        ([0.1, 0.2, 0.5, 1.0], "normalised", (10, 40, 50, 200)),
        ([102, 200, 540, 1000], "thousandths", (10.25, 40.1, 54.05, 199.9)),
        ([-1, -0.5, 101, 201], "xyxy", (0, 0, 100, 200)),  # a pixel over the edge is clipped
    ],
)
def test_read_box_converts_formats_and_clips(values: Any, box_format: Any, pixels: tuple[float, ...]) -> None:
    assert read_box(values, box_format, 100, 200) == pytest.approx(pixels)


@pytest.mark.parametrize("side", [28, 640, 1001, 4000])
def test_thousandths_are_written_as_they_were_read(side: int) -> None:
    for value in range(999):
        box = read_box([value, value, 999, 1000], "thousandths", side, side)
        assert to_thousandths(box, side, side) == (value, value, 999, 999)


@pytest.mark.parametrize(
    "values",
    [
        [10, 20, 10, 50],
        [30, 20, 10, 50],
        [10, 50, 30, 20],
        [-1.1, 0, 5, 5],
        [0, 0, 101.1, 5],
        [0, 0, 5, 201.1],
        [200, 0, 300, 5],
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        "1234",
        None,
        [1, 2, 3, "4"],
        [1, 2, True, 4],
        {"x": 1},
        [1, 2, float("nan"), 4],
        [1, 2, float("inf"), 4],
        [1, 2, 10**400, 4],
        [-0.9, 0, -0.1, 5],
        [100, 0, 100.9, 5],
    ],
)
def test_bad_box_is_rejected(values: Any) -> None:
    with pytest.raises(BadSample) as caught:
        read_box(values, "xyxy", 100, 200)
    assert caught.value.reason == "bad_box"


def test_thousandths_above_1000_are_rejected() -> None:
    with pytest.raises(BadSample, match="exceeds the image"):
        read_box([0, 0, 1024, 768], "thousandths", 1024, 768)  # pixels


def test_box_thinner_than_a_step_is_rejected() -> None:
    for box in ((1, 1, 1.5, 500), (1, 1, 500, 1.5)):
        with pytest.raises(BadSample, match="less than a thousandth"):
            to_thousandths(box, 1000, 1000)


def test_bounding_box_of_a_polygon() -> None:
    assert bounding_box([[5, 60], [70, 52], [71, 66], [6, 74]]) == (5, 52, 71, 74)


def test_written_boxes_finds_all_boxes_of_a_text() -> None:
    text = "The cat [[102,80,540,910]] and [[1, 2, 3, 4], [5,6,7,8]]; "
    text += "[[9,9,9,9]] [1,2,3,4] [[1,2,3,1000]] [[1,2,3]] a[0][[1]]"
    text += " [[-1,2,3,4]] [0.5,2,3,4]"
    found = [box for _, box in written_boxes(text)]
    wrong: list[Box] = [(9, 9, 9, 9), (1, 2, 3, 1000), (-1, 2, 3, 4)]
    good: list[Box] = [(102, 80, 540, 910), (1, 2, 3, 4), (5, 6, 7, 8), (1, 2, 3, 4), (0.5, 2, 3, 4)]
    assert sorted(found) == sorted(good + wrong)
    assert [box for box in found if is_valid_box(box)] == good
    assert all(text[start:].startswith(f"[{box[0]:g},") for start, box in written_boxes(text))
    rng = random.Random(1)
    boxes = [
        to_thousandths((a, b, a + 9, b + 9), 100, 100)
        for a, b in ((rng.uniform(0, 90), rng.uniform(0, 90)) for _ in range(99))
    ]
    written = write_boxes(boxes)
    assert [box for _, box in written_boxes(f"x {written} y")] == boxes
    assert json.loads(written) == [list(box) for box in boxes]
    assert re.fullmatch(r"[\[\]\d,]+", written)


def test_written_boxes_is_fast_on_hostile_text() -> None:
    began = time.process_time()
    for text in ("[" * 200_000, "[[1,2,3,4]," * 20_000, "[[" + "1," * 200_000, "[[1,2,3,4] " * 20_000):
        list(written_boxes(text))
    assert time.process_time() - began < 5
