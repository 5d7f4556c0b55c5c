"""Pictures and clips for tests, as real files or as plain arrays. Needs nothing but numpy, Pillow and PyAV."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image


def pattern(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] in integer arithmetic, the same everywhere: gradients, edges and rough texture."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int32)
    seed += 1
    ramp = (x * 255 // max(width - 1, 1) + y * 40 * seed) % 256
    checks = ((x // (5 + seed % 7) + y // (3 + seed % 5)) % 2) * 170 + (x * y) % 61
    rough = (x * x * 7 + y * y * 13 + x * y * seed + seed * 31) % 251
    return np.stack([ramp, checks % 256, rough], axis=-1).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """An image file of these RGB pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def clip(
    frames: int, height: int = 64, width: int = 96, fps: int = 8, format: str = "mp4", codec: str = "libx264"
) -> bytes:
    """A video file; every frame differs from the others."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        container.start_encoding()  # writes a header even where no frame follows
        y, x = np.mgrid[0:height, 0:width]
        for index in range(frames):
            pixels = np.stack([(x + 5 * index) % 256, (y * 2 + index) % 256, (x + y) % 256], axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
