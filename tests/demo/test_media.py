"""The demo's media: distinct subjects, repeatable views and videos, true boxes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from demo.errors import DemoError
from demo.media import collage, cut, locate, scenes, subjects, view


@pytest.mark.fast
def test_subjects_are_distinct() -> None:
    assert len(subjects()) >= 40
    for key in (lambda s: f"{s.file} {s.frame}", lambda s: s.noun, lambda s: s.caption):
        assert len({key(subject) for subject in subjects()}) == len(subjects())


@pytest.mark.fast
def test_view_is_repeatable_and_differs_between_seeds() -> None:
    cat = next(subject for subject in subjects() if subject.name == "tabby_cat")
    first, again, other = (np.asarray(view(cat, Random(seed))) for seed in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_cut_writes_the_same_file_every_time(tmp_path: Path) -> None:
    scene = next(scene for scene in scenes() if scene.name == "taxi")
    for name in ("one.mp4", "two.mp4"):
        cut(scene, tmp_path / name, Random("cut"))
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(5))
def test_collage_boxes_are_where_the_images_are(seed: int) -> None:
    wide, tall = Image.new("RGB", (60, 40), "black"), Image.new("RGB", (40, 60), "black")
    canvas, boxes = collage([wide, tall], Random(seed))
    inside = np.zeros((canvas.height, canvas.width), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        inside[int(y1) : int(y2), int(x1) : int(x2)] = True
    assert np.array_equal(np.asarray(canvas.convert("L")) < 128, inside)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("package", "file", "message"),
    [
        ("no_such_package", "image.png", r"package no_such_package is not installed: run `pip install"),
        ("numpy", "no_such_image.png", r"package numpy has no file no_such_image.png: run `pip install"),
    ],
)
def test_missing_media_is_an_error_that_says_how_to_fix_it(package: str, file: str, message: str) -> None:
    with pytest.raises(DemoError, match=message):
        locate(package, file)
