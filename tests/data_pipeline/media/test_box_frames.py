"""Boxes of images that were shrunk or turned after they were annotated, against the pixels of Pillow."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.errors import BadSample
from data_pipeline.inputs.grounding.boxed_captions import Grounding
from data_pipeline.media.box_frames import find_frame
from data_pipeline.media.boxes import Box
from tests.data_pipeline.inputs.reading import read

pytestmark = pytest.mark.fast

STORED = (120, 80)
BOX = (30, 20, 60, 40)  # of the stored image
ORIENTATION = 0x0112


def marked(orientation: int, size: tuple[int, int] = STORED) -> Image.Image:
    """Return an image with a white rectangle at BOX, with an EXIF orientation."""
    image = Image.new("RGB", STORED)
    image.paste((255, 255, 255), BOX)
    image = image.resize(size, Image.Resampling.NEAREST)
    image.getexif()[ORIENTATION] = orientation
    return image


def white(image: Image.Image) -> Box:
    """Return where an image is white once it is upright."""
    upright = np.asarray(ImageOps.exif_transpose(image).convert("L"))
    ys, xs = np.nonzero(upright)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_box_of_the_stored_image_lies_where_pillow_turns_its_pixels(orientation: int, scale: float) -> None:
    size = (round(STORED[0] * scale), round(STORED[1] * scale))
    frame = find_frame(STORED, size, orientation)
    assert frame.upright(BOX) == white(marked(orientation, size))


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_box_without_a_size_counts_in_the_upright_image(orientation: int) -> None:
    assert find_frame((None, None), STORED, orientation).upright(BOX) == BOX


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_box_of_the_upright_image_stays(orientation: int) -> None:
    box = white(marked(orientation))
    assert find_frame((STORED[1], STORED[0]), STORED, orientation).upright(box) == box


@pytest.mark.parametrize(
    ("given", "stored", "orientation"),
    [
        ((100, 100), STORED, 1),  # another image
        ((121, 60), STORED, 1),
        (STORED, STORED, 3),  # before or after it is turned?
        ((50, 50), (100, 100), 6),
        (("120", 80), STORED, 1),
        ((0, 80), STORED, 1),
        ((120, None), STORED, 1),
        ((float("nan"), 80), STORED, 1),
    ],
)
def test_size_that_is_not_that_of_the_file_is_rejected(given, stored, orientation: int) -> None:
    with pytest.raises(BadSample, match="size_mismatch"):
        find_frame(given, stored, orientation)


def test_sides_that_were_rounded_as_the_image_was_shrunk_are_accepted() -> None:
    for width, height in ((640, 427), (4032, 3024), (1333, 999)):
        for side in (100, 224, 333, 500):
            shrunk = Image.new("RGB", (width, height))
            shrunk.thumbnail((side, side))
            x1, y1, x2, y2 = find_frame((width, height), shrunk.size, 1).upright((0, 0, width, height))
            assert (x1, y1, x2, y2) == (0, 0, *shrunk.size)


def test_coco_and_lines_scale_and_turn_their_boxes(tmp_path: Path) -> None:
    for name, image in (("small", marked(1, (60, 40))), ("turned", marked(6))):
        data = io.BytesIO()
        image.save(data, "JPEG", exif=image.getexif())
        (tmp_path / f"{name}.jpg").write_bytes(data.getvalue())
    size = {"width": 120, "height": 80}
    images = [{"id": number, "file_name": f"{name}.jpg", **size} for number, name in enumerate(("small", "turned"))]
    annotations = [{"id": n, "image_id": n, "category_id": 1, "bbox": [30, 20, 30, 20]} for n in (0, 1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    phrase = {"text": "box", "boxes": [BOX]}
    lines = [{"image": f"{name}.jpg", "caption": "box", "phrases": [phrase], **size} for name in ("small", "turned")]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for file in ("coco.json", "lines.jsonl"):
        drafts, _ = read(Grounding((str(tmp_path / file),)))
        boxes = [draft.record["text"].split("box ")[1] for draft in drafts]
        assert boxes == ["[[250,250,500,500]]", "[[500,250,750,500]]"]
