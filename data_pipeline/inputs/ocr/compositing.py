"""Ink onto a ground: colours that can be told apart, a turn, a blur, an image file."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.ocr.typesetting import Block
from data_pipeline.media.boxes import Box, bounding_box
from data_pipeline.media.images import decode_image

Colour = tuple[int, int, int]
PixelBox = tuple[int, int, int, int]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Scenery:
    """margin: pixels around the ink; angle: degrees, counterclockwise; contrast: least WCAG ratio; blur: radius in
    pixels; quality: of JPEG, None for PNG; pictures: files to draw on."""

    margin: int
    angle: float
    contrast: float
    blur: float
    quality: int | None
    pictures: Sequence[str] = ()


def compose(block: Block, scenery: Scenery, lot: random.Random) -> tuple[Media, list[PixelBox]]:
    """Draws a block of ink by lot -> (the picture, where each line's ink lies in it: whole pixels, inside it)."""
    mask, boxes = turned(block, scenery.angle, scenery.margin)
    ground = _ground(mask.size, scenery.pictures, lot)
    colour, ground = readable(ground, scenery.contrast, lot)
    picture = Image.fromarray(ground)
    picture.paste(colour, mask=mask)
    if scenery.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(scenery.blur))
    buffer = io.BytesIO()
    if scenery.quality is None:
        picture.save(buffer, "PNG")
        return Media("png", buffer.getvalue()), boxes
    picture.save(buffer, "JPEG", quality=scenery.quality)
    return Media("jpg", buffer.getvalue()), boxes


def turned(block: Block, angle: float, margin: int) -> tuple[Image.Image, list[PixelBox]]:
    """The mask turned about its middle on a canvas that holds all of it and a margin; the lines' upright boxes."""
    width, height = block.mask.size
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    canvas = (
        math.ceil(width * cos + height * abs(sin)) + 2 * margin,
        math.ceil(width * abs(sin) + height * cos) + 2 * margin,
    )
    if angle == 0:  # no resampling
        mask = Image.new("L", canvas)
        mask.paste(block.mask, (margin, margin))
        return mask, [
            _inside((x1 + margin, y1 + margin, x2 + margin, y2 + margin), canvas) for x1, y1, x2, y2 in block.boxes
        ]

    def forward(x: float, y: float) -> tuple[float, float]:
        x, y = x - width / 2, y - height / 2
        return cos * x + sin * y + canvas[0] / 2, cos * y - sin * x + canvas[1] / 2

    left = width / 2 - (cos * canvas[0] - sin * canvas[1]) / 2
    top = height / 2 - (sin * canvas[0] + cos * canvas[1]) / 2
    backward = (cos, -sin, left, sin, cos, top)  # from the canvas to the block, as Pillow asks for it
    mask = block.mask.transform(canvas, Image.Transform.AFFINE, backward, Image.Resampling.BICUBIC)
    corners = ([forward(x, y) for x in (x1, x2) for y in (y1, y2)] for x1, y1, x2, y2 in block.boxes)
    return mask, [_inside(bounding_box(points), canvas) for points in corners]


def readable(ground: np.ndarray, contrast: float, lot: random.Random) -> tuple[Colour, np.ndarray]:
    """An ink whose contrast with every pixel of the ground, uint8 [H, W, 3], reaches the floor -> (ink, ground).

    Takes the first of some random colours that does, half of the time after a dark grey, then black or white; where
    even these do not, the ground is faded as far as they need.
    """
    tried: list[Colour] = [_grey(lot, 0, 60)] if lot.random() < 0.5 else []
    tried += [_colour(lot) for _ in range(8)]
    luminance = _luminance(ground)
    darkest, lightest = float(luminance.min()), float(luminance.max())
    for ink in (*tried, BLACK, WHITE):
        if _least_contrast(ink, darkest, lightest) >= contrast:
            return ink, ground
    ink, fade_to = (BLACK, 255.0) if float(luminance.mean()) > 0.18 else (WHITE, 0.0)
    for tenth in range(1, 11):
        faded = (ground + (fade_to - ground) * (tenth / 10)).round().astype(np.uint8)
        luminance = _luminance(faded)
        if _least_contrast(ink, float(luminance.min()), float(luminance.max())) >= contrast:
            break
    return ink, faded


def contrast_ratio(first: float, second: float) -> float:
    """WCAG 2's contrast of two relative luminances, 1 to 21."""
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def _least_contrast(ink: Colour, darkest: float, lightest: float) -> float:
    own = float(_luminance(np.array(ink, dtype=np.uint8)))
    if darkest <= own <= lightest:
        return 1.0
    return min(contrast_ratio(own, darkest), contrast_ratio(own, lightest))


def _luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB as WCAG 2 defines it: uint8 [..., 3] -> [...] from 0 to 1."""
    return _LINEAR[rgb] @ np.array([0.2126, 0.7152, 0.0722])


_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)


def _ground(size: tuple[int, int], pictures: Sequence[str], lot: random.Random) -> np.ndarray:
    """A ground by lot: uint8 [height, width, 3]."""
    kind = lot.choice(("paper", "plain", "graded", "noisy", *(("picture",) if pictures else ())))
    if kind == "picture" and (picture := _cut_out(lot.choice(pictures), size, lot)) is not None:
        return picture
    width, height = size
    colour = np.array(_grey(lot, 225, 255) if kind == "paper" else _colour(lot), np.float32)
    if kind == "graded":
        across = lot.random() < 0.5
        along = np.linspace(0, lot.uniform(0.1, 0.6), width if across else height, dtype=np.float32)
        ramp = _as_bytes(colour + (np.array(_colour(lot), np.float32) - colour) * along[:, None])
        return np.broadcast_to(ramp[None] if across else ramp[:, None], (height, width, 3)).copy()
    if kind == "noisy":
        levels = np.arange(256, dtype=np.float32)[:, None] / 255 - 0.5
        grain = np.frombuffer(lot.randbytes(width * height), np.uint8).reshape(height, width)
        return _as_bytes(colour + levels * lot.uniform(4, 40))[grain]
    return np.broadcast_to(_as_bytes(colour), (height, width, 3)).copy()


def _as_bytes(levels: np.ndarray) -> np.ndarray:
    return levels.round().clip(0, 255).astype(np.uint8)


def _cut_out(path: str, size: tuple[int, int], lot: random.Random) -> np.ndarray | None:
    """A part of a picture, of this shape and made this large; None if the picture cannot be read."""
    try:
        picture = Image.fromarray(decode_image(Path(path).read_bytes()))
    except (BadSample, OSError):
        return None
    largest = min(picture.width / size[0], picture.height / size[1])
    scale = largest * lot.uniform(0.4, 1.0)
    width, height = size[0] * scale, size[1] * scale
    left, top = lot.uniform(0, picture.width - width), lot.uniform(0, picture.height - height)
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height)))


def _colour(lot: random.Random) -> Colour:
    return lot.randrange(256), lot.randrange(256), lot.randrange(256)


def _grey(lot: random.Random, darkest: int, lightest: int) -> Colour:
    level = lot.randint(darkest, lightest)
    return level, level, level


def _inside(box: Box, canvas: tuple[int, int]) -> PixelBox:
    x1, y1, x2, y2 = box
    return (
        max(math.floor(x1), 0),
        max(math.floor(y1), 0),
        min(math.ceil(x2), canvas[0]),
        min(math.ceil(y2), canvas[1]),
    )
