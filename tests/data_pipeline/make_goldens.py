"""Make goldens.npz: the output of transformers' default (torchvision) GLM processors for known images and videos.

goldens_glm46v.npz is that of GLM-4.6V's video processor.

torchvision does not load beside the CPU build of torch that the tests use, so this runs once, in a separate
environment, and the tests compare with the file:

    python -m venv scratch
    scratch/bin/pip install -r benchmarks/requirements.txt
    scratch/bin/python tests/data_pipeline/make_goldens.py

For every image or video the file holds the grid, a checksum of all pixel values, and a few of the values. For the
checksum the values are converted back into the bytes that they came from; if that is not exact, an error is raised.
"""

from __future__ import annotations

import io
import json
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.data_pipeline.media_files import pattern, real_images, real_videos

Goldens = dict[str, np.ndarray]

GOLDENS, GOLDENS_GLM46V = (Path(__file__).with_name(name) for name in ("goldens.npz", "goldens_glm46v.npz"))
KEPT = 96  # values of each image or video

IMAGE_BUDGET = {"shortest_edge": 112 * 112, "longest_edge": 14 * 14 * 2 * 2 * 2 * 6144}
SMALL_IMAGE_BUDGET = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 64}
IMAGE_SIZES = [
    (28, 28),
    (14, 20),
    (1, 1),
    (3, 9),
    (27, 100),
    (100, 27),
    (29, 29),
    (42, 42),
    (70, 98),
    (56, 112),
    (112, 112),
    (100, 100),
    (111, 113),
    (126, 126),
    (140, 154),
    (224, 224),
    (225, 223),
    (336, 336),
    (337, 335),
    (480, 640),
    (512, 768),
    (333, 517),
    (517, 333),
    (601, 199),
    (97, 911),
    (720, 1280),
    (1080, 1920),
    (1200, 900),
    (28, 2800),
    (2800, 28),
    (30, 5000),
    (20, 3000),
    (5000, 30),
    (41, 1999),
    (15, 1500),
    (84, 84),
    (56, 56),
    (55, 57),
    (196, 28),
    (98, 1001),
    (1001, 98),
    (130, 420),
    (2160, 3840),
]
SMALL_BUDGET_SIZES = [(28, 28), (100, 100), (200, 300), (333, 517), (640, 480), (1080, 1920), (30, 3000), (1000, 77)]

VIDEO_BUDGETS = [(112 * 112, 28 * 28 * 2 * 30000), (112 * 112, 28 * 28 * 2 * 200)]
VIDEOS = [  # frames, height, width, fps
    (1, 56, 84, 2.0),
    (2, 56, 84, 1.0),
    (3, 40, 50, 30.0),
    (5, 60, 90, 1.0),
    (16, 120, 160, 8.0),
    (30, 72, 128, 29.97),
    (48, 64, 64, 23.976),
    (25, 33, 77, 25.0),
    (61, 28, 280, 12.5),
    (7, 240, 320, 3.0),
]
# GLM-4.6V's processor fails on videos of less than a sixth of a second. Longer ones are sampled at other rates.
VIDEOS_GLM46V = [
    *(video for video in VIDEOS if video[0] / video[3] > 1 / 6),
    (45, 56, 84, 25.0),
    (200, 28, 56, 5.0),
    (160, 56, 28, 0.4),
]


def kept_positions(count: int) -> np.ndarray:
    """Return KEPT positions spread over a flat array of `count` values."""
    return (np.arange(KEPT, dtype=np.int64) * 7919 * 104729 + 17) % count


def bytes_of(values: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    """Convert normalised values [patches, 3 * 2 * 196] back into the uint8 values that they came from."""
    channels = values.reshape(len(values), 3, -1).astype(np.float64)
    exact = (channels * np.array(std)[:, None] + np.array(mean)[:, None]) * 255
    rounded = np.round(exact)
    if np.abs(exact - rounded).max() > 1e-3:
        raise SystemExit("the processor's values are not normalised bytes")
    return rounded.astype(np.uint8).reshape(len(values), -1)


def keep(goldens: Goldens, name: str, values: np.ndarray, grid: Any, processor: Any) -> None:
    """Add the grid, some values and the checksum of one output of a processor."""
    flat = values.reshape(-1)
    goldens[f"{name}/grid"] = np.asarray(grid, dtype=np.int32)
    goldens[f"{name}/values"] = flat[kept_positions(flat.size)].astype(np.float32)
    checksum = zlib.crc32(bytes_of(values, processor.image_mean, processor.image_std).tobytes())
    goldens[f"{name}/crc32"] = np.asarray(checksum, dtype=np.uint32)


def keep_image(goldens: Goldens, name: str, image: Image.Image, processor: Any) -> None:
    out = processor([image], return_tensors="pt")
    keep(goldens, name, out["pixel_values"].numpy(), out["image_grid_thw"].numpy(), processor)


def keep_video(goldens: Goldens, name: str, video: np.ndarray, metadata: Any, processor: Any, **options: Any) -> None:
    """Add the output for a video, with the indices and timestamps of its frames."""
    out = processor([video], video_metadata=[metadata], return_metadata=True, return_tensors="pt", **options)
    keep(goldens, name, out["pixel_values_videos"].numpy(), out["video_grid_thw"].numpy(), processor)
    sampled = out["video_metadata"][0] if not options else metadata
    goldens[f"{name}/indices"] = np.asarray(sampled.frames_indices, dtype=np.int32)
    goldens[f"{name}/timestamps"] = np.asarray(sampled.timestamps, dtype=np.float64)


def upright(file: io.BytesIO) -> Image.Image:
    """Return the image for the processor, which converts it to RGB. 16 bits of grey lose their lower 8 before."""
    image = ImageOps.exif_transpose(Image.open(file))
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode == "I;16" else image


def add_images(goldens: Goldens) -> None:
    from transformers import Glm4vImageProcessor

    for budget, sizes in ((IMAGE_BUDGET, IMAGE_SIZES), (SMALL_IMAGE_BUDGET, SMALL_BUDGET_SIZES)):
        processor = Glm4vImageProcessor(size=budget)
        for seed, (height, width) in enumerate(sizes):
            name = f"image/{budget['longest_edge']}/{height}x{width}/{seed}"
            keep_image(goldens, name, Image.fromarray(pattern(height, width, seed)), processor)

    # Files whose pixels must first be converted, read as transformers reads them.
    processor = Glm4vImageProcessor(size=IMAGE_BUDGET)
    for mode in ("L", "P", "RGBA", "LA", "1", "I;16"):
        buffer = io.BytesIO()
        image = Image.fromarray(pattern(90, 130, 5))
        if mode == "RGBA":
            image.putalpha(Image.fromarray(pattern(90, 130, 6)[..., 2]))
        elif mode == "I;16":
            image = Image.fromarray(pattern(90, 130, 5)[..., 2].astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        image.save(buffer, "PNG")
        goldens[f"file/{mode}/bytes"] = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
        keep_image(goldens, f"file/{mode}", upright(buffer), processor)

    for name, data in real_images():
        keep_image(goldens, f"picture/{name}", upright(io.BytesIO(data)), processor)
        goldens[f"picture/{name}/file"] = np.asarray(zlib.crc32(data), dtype=np.uint32)


def add_videos(goldens: Goldens, processor_class: Any, videos: list[tuple[int, int, int, float]]) -> None:
    from transformers.video_utils import VideoMetadata, read_video_pyav

    for shortest, longest in VIDEO_BUDGETS:
        processor = processor_class(size={"shortest_edge": shortest, "longest_edge": longest})
        for seed, (frames, height, width, fps) in enumerate(videos):
            video = np.stack([pattern(height, width, seed + index) for index in range(frames)])
            metadata = VideoMetadata(total_num_frames=frames, fps=fps, duration=frames / fps)
            keep_video(goldens, f"video/{longest}/{seed}", video, metadata, processor)

        for name, data in real_videos():
            video, metadata = read_video_pyav(io.BytesIO(data), processor.sample_frames)
            # The reader returns a frame once that is sampled twice.
            seen = list(dict.fromkeys(metadata.frames_indices.tolist()))
            video = video[[seen.index(index) for index in metadata.frames_indices]]
            keep_video(goldens, f"clip/{longest}/{name}", video, metadata, processor, do_sample_frames=False)
            goldens[f"clip/{longest}/{name}/file"] = np.asarray(zlib.crc32(data), dtype=np.uint32)


def main() -> None:
    from transformers import Glm4vVideoProcessor, Glm46VVideoProcessor

    goldens: Goldens = {}
    add_images(goldens)
    add_videos(goldens, Glm4vVideoProcessor, VIDEOS)
    save(GOLDENS, goldens)
    goldens = {}
    add_videos(goldens, Glm46VVideoProcessor, VIDEOS_GLM46V)
    save(GOLDENS_GLM46V, goldens)


def save(path: Path, goldens: Goldens) -> None:
    """Write a file of goldens, with the versions of the libraries that made them."""
    versions = {package: version(package) for package in ("torch", "torchvision", "transformers")}
    goldens["versions"] = np.frombuffer(json.dumps(versions).encode(), dtype=np.uint8)
    np.savez_compressed(path, **goldens)  # type: ignore[arg-type]
    print(f"{path.name}: {len(goldens)} arrays, {path.stat().st_size:,} bytes, {versions}")


if __name__ == "__main__":
    main()
