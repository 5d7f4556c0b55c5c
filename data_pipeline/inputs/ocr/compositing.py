"""Compositing of a text mask on a random background: readable colours, a rotation, a blur, an image file."""

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
from data_pipeline.inputs.ocr.typesetting import TextMask
from data_pipeline.media.boxes import Box, bounding_box
from data_pipeline.media.image_files import decode_image

Colour = tuple[int, int, int]
PixelBox = tuple[int, int, int, int]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Compositing:
    """How a text mask becomes an image."""

    margin: int  # pixels around the text
    angle: float  # degrees, counterclockwise
    contrast: float  # least WCAG contrast ratio of the text with its background
    blur: float  # radius in pixels
    quality: int | None  # of JPEG; None for PNG
    backgrounds: Sequence[str] = ()  # image files to draw on


def compose(text: TextMask, options: Compositing, rng: random.Random) -> tuple[Media, list[PixelBox]]:
    """Draw a text mask in a random colour on a random background.

    Returns:
        The image file, and the bounding box of each line's glyphs in it, in whole pixels inside the image.
    """
    mask, boxes = rotate_mask(text, options.angle, options.margin)
    background = _background(mask.size, options.backgrounds, rng)
    colour, background = readable_colour(background, options.contrast, rng)
    image = Image.fromarray(background)
    image.paste(colour, mask=mask)
    if options.blur:
        image = image.filter(ImageFilter.GaussianBlur(options.blur))
    buffer = io.BytesIO()
    if options.quality is None:
        image.save(buffer, "PNG")
        return Media("png", buffer.getvalue()), boxes
    image.save(buffer, "JPEG", quality=options.quality)
    return Media("jpg", buffer.getvalue()), boxes


def rotate_mask(text: TextMask, angle: float, margin: int) -> tuple[Image.Image, list[PixelBox]]:
    """Return the mask rotated about its centre, and the upright bounding boxes of its lines.

    Args:
        text: The mask and its boxes.
        angle: Degrees, counterclockwise.
        margin: Pixels around the rotated mask.
    """
    width, height = text.mask.size
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    canvas = (
        math.ceil(width * cos + height * abs(sin)) + 2 * margin,
        math.ceil(width * abs(sin) + height * cos) + 2 * margin,
    )
    if angle == 0:  # no resampling
        mask = Image.new("L", canvas)
        mask.paste(text.mask, (margin, margin))
        return mask, [
            _inside((x1 + margin, y1 + margin, x2 + margin, y2 + margin), canvas) for x1, y1, x2, y2 in text.boxes
        ]

    def to_canvas(x: float, y: float) -> tuple[float, float]:
        x, y = x - width / 2, y - height / 2
        return cos * x + sin * y + canvas[0] / 2, cos * y - sin * x + canvas[1] / 2

    left = width / 2 - (cos * canvas[0] - sin * canvas[1]) / 2
    top = height / 2 - (sin * canvas[0] + cos * canvas[1]) / 2
    to_mask = (cos, -sin, left, sin, cos, top)  # Pillow wants the transform from the canvas to the mask
    mask = text.mask.transform(canvas, Image.Transform.AFFINE, to_mask, Image.Resampling.BICUBIC)
    corners = ([to_canvas(x, y) for x in (x1, x2) for y in (y1, y2)] for x1, y1, x2, y2 in text.boxes)
    return mask, [_inside(bounding_box(points), canvas) for points in corners]


def readable_colour(background: np.ndarray, contrast: float, rng: random.Random) -> tuple[Colour, np.ndarray]:
    """Return a text colour whose contrast with every pixel of the background is at least `contrast`.

    It is the first suitable one of some random colours (half of the time a dark grey comes first), then black, then
    white. If none is suitable, the background is faded as far as necessary.

    Args:
        background: uint8 [height, width, 3].
        contrast: WCAG contrast ratio, 1 to 21.
        rng: Source of the random colours.

    Returns:
        The colour, and the background, uint8 [height, width, 3].
    """
    tried: list[Colour] = [_grey(rng, 0, 60)] if rng.random() < 0.5 else []
    tried += [_colour(rng) for _ in range(8)]
    luminance = _luminance(background)
    darkest, lightest = float(luminance.min()), float(luminance.max())
    for colour in (*tried, BLACK, WHITE):
        if _least_contrast(colour, darkest, lightest) >= contrast:
            return colour, background
    colour, fade_to = (BLACK, 255.0) if float(luminance.mean()) > 0.18 else (WHITE, 0.0)
    for tenths in range(1, 11):
        faded = (background + (fade_to - background) * (tenths / 10)).round().astype(np.uint8)
        luminance = _luminance(faded)
        if _least_contrast(colour, float(luminance.min()), float(luminance.max())) >= contrast:
            break
    return colour, faded


def contrast_ratio(first: float, second: float) -> float:
    """Return the WCAG 2 contrast of two relative luminances, 1 to 21."""
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def _least_contrast(colour: Colour, darkest: float, lightest: float) -> float:
    own = float(_luminance(np.array(colour, dtype=np.uint8)))
    if darkest <= own <= lightest:
        return 1.0
    return min(contrast_ratio(own, darkest), contrast_ratio(own, lightest))


def _luminance(rgb: np.ndarray) -> np.ndarray:
    """Return the relative luminance of sRGB as WCAG 2 defines it: uint8 [..., 3] -> [...] from 0 to 1."""
    return _LINEAR[rgb] @ np.array([0.2126, 0.7152, 0.0722])


_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)


def _background(size: tuple[int, int], images: Sequence[str], rng: random.Random) -> np.ndarray:
    """Return a random background of a (width, height): uint8 [height, width, 3]."""
    kind = rng.choice(["paper", "plain", "gradient", "noise", *(["image"] if images else [])])
    if kind == "image" and (crop := _random_crop(rng.choice(images), size, rng)) is not None:
        return crop
    width, height = size
    colour = np.array(_grey(rng, 225, 255) if kind == "paper" else _colour(rng), np.float32)
    if kind == "gradient":
        horizontal = rng.random() < 0.5
        steps = np.linspace(0, rng.uniform(0.1, 0.6), width if horizontal else height, dtype=np.float32)
        ramp = _as_bytes(colour + (np.array(_colour(rng), np.float32) - colour) * steps[:, None])
        return np.broadcast_to(ramp[None] if horizontal else ramp[:, None], (height, width, 3)).copy()
    if kind == "noise":
        levels = np.arange(256, dtype=np.float32)[:, None] / 255 - 0.5
        noise = np.frombuffer(rng.randbytes(width * height), np.uint8).reshape(height, width)
        return _as_bytes(colour + levels * rng.uniform(4, 40))[noise]
    return np.broadcast_to(_as_bytes(colour), (height, width, 3)).copy()


def _as_bytes(levels: np.ndarray) -> np.ndarray:
    return levels.round().clip(0, 255).astype(np.uint8)


def _random_crop(path: str, size: tuple[int, int], rng: random.Random) -> np.ndarray | None:
    """Return a random crop of an image, resized to a (width, height); None if the image cannot be read."""
    try:
        image = Image.fromarray(decode_image(Path(path).read_bytes()))
    except (BadSample, OSError):
        return None
    largest = min(image.width / size[0], image.height / size[1])
    scale = largest * rng.uniform(0.4, 1.0)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height)))


def _colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _grey(rng: random.Random, darkest: int, lightest: int) -> Colour:
    level = rng.randint(darkest, lightest)
    return level, level, level


def _inside(box: Box, canvas: tuple[int, int]) -> PixelBox:
    """Return a box rounded outwards to whole pixels and clipped to the canvas."""
    x1, y1, x2, y2 = box
    return (
        max(math.floor(x1), 0),
        max(math.floor(y1), 0),
        min(math.ceil(x2), canvas[0]),
        min(math.ceil(y2), canvas[1]),
    )
