"""Samples for the tests of curation: photographs of scikit-image, and candidates without a shard."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Filtered, SetFilter
from data_pipeline.shards.reader import RawSample
from tests.data_pipeline.media_files import make_reproducible

PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "camera.png",
    "coins.png",
    "hubble_deep_field.jpg",
)


@lru_cache(maxsize=16)
def photo(name: str, size: int = 240) -> Image.Image:
    """Return a photograph whose shorter side has `size` pixels."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    with Image.open(Path(spec.origin).parent / "data" / name) as image:
        scale = size / min(image.size)
        return image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def video_of(frames: Sequence[np.ndarray], fps: int = 8, **options: Any) -> bytes:
    """Return a video file of these frames, uint8 [height, width, 3] each. options: of the encoder."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        make_reproducible(stream)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def candidate(
    text: str = "A text.",
    images: Sequence[bytes] = (),
    videos: Sequence[bytes] = (),
    domain: str = "image_text",
    name: str = "shard.tar/0",
    **record: Any,
) -> Candidate:
    return Candidate(name, RawSample({"domain": domain, "text": text, **record}, list(images), list(videos)))


class InMemory:
    """RemainingSamples of a few candidates, as shards of `shard_size` samples."""

    def __init__(self, step: SetFilter, samples: Sequence[Candidate], shard_size: int = 3) -> None:
        self.samples, self.shard_size = samples, shard_size
        self.features = [step.feature(sample) for sample in samples]
        self.type = step.feature_type

    def chunks(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
        for start in range(0, len(self.samples), self.shard_size):
            shard = range(start, min(start + self.shard_size, len(self.samples)))
            rows = [row for row in shard if self.features[row] is not None]
            if rows:
                yield np.array(rows), pa.array([self.features[row] for row in rows], self.type)

    def name(self, row: int) -> str:
        return self.samples[row].name

    def text(self, row: int) -> str:
        return self.samples[row].text


def filtered(step: SetFilter, samples: Sequence[Candidate]) -> dict[int, Filtered]:
    """Return what a filter says of these samples, by row."""
    return dict(step.decide(InMemory(step, samples)))
