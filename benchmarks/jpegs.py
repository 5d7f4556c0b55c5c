"""The JPEGs that the data benchmarks share: crops of the photographs that scikit-image and scikit-learn contain.

4,000 of them have the sizes of a real set of captioned images: 0.54 megapixels and 100 kB each on average.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "scikit-image": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "scikit-learn": ("china.jpg", "flower.jpg"),
}
MEAN_PIXELS, SPREAD = 0.54e6, 0.7
Files = list[tuple[str, bytes]]  # (extension, bytes) of each member of a sample


def photographs() -> list[Image.Image]:
    """Return the photographs of the installed packages."""
    found = []
    for package, names in PHOTOGRAPHS.items():
        try:
            listed = files(package) or []
        except PackageNotFoundError:
            raise SystemExit(f"{package} is not installed: pip install -c constraints.txt -e '.[demo]'") from None
        found += [Image.open(str(path.locate())).convert("RGB") for path in listed if path.name in names]
    return found


def jpegs(seed: int = 0) -> Iterator[bytes]:
    """Yield JPEG files: crops of photographs, with sizes like those of images on the web. Endless."""
    rng = np.random.default_rng(seed)
    sources = photographs()
    while True:
        source = sources[rng.integers(len(sources))]
        width, height = (int(side * rng.uniform(0.5, 1)) for side in source.size)
        left, top = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
        scale = (MEAN_PIXELS * rng.lognormal(-(SPREAD**2) / 2, SPREAD) / (width * height)) ** 0.5
        size = max(int(width * scale), 64), max(int(height * scale), 64)
        crop = source.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=int(rng.integers(80, 95)))
        yield buffer.getvalue()


def samples(count: int) -> list[tuple[str, Files]]:
    """Return captioned images as (key, files): a record and a JPEG each."""
    made: list[tuple[str, Files]] = []
    for number, data in enumerate(islice(jpegs(), count)):
        record = json.dumps({"domain": "image_text", "text": f"Photograph {number}, {len(data)} bytes."})
        made.append((f"{number:09d}", [("json", record.encode()), ("0.jpg", data)]))
    return made


def kept_folder(folder: Path, count: int) -> Path:
    """Return where `load` keeps its samples."""
    return folder / f"images-{count}"


def load(folder: Path, count: int) -> list[tuple[str, Files]]:
    """Return the same samples. They are made once and kept in a folder, because making 4,000 takes a minute."""
    kept = kept_folder(folder, count)
    if not kept.is_dir():
        temporary = kept.with_name(f"{kept.name}.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        for key, members in samples(count):
            for extension, data in members:
                (temporary / f"{key}.{extension}").write_bytes(data)
        temporary.rename(kept)
    return [
        (path.stem, [(extension, path.with_suffix(f".{extension}").read_bytes()) for extension in ("json", "0.jpg")])
        for path in sorted(kept.glob("*.json"))
    ]
