"""The pictures that the benchmarks of data share: crops of the photographs that scikit-image and scikit-learn ship.

4,000 of them have the sizes of a real set of captioned pictures: 0.54 megapixels and 100 kB each on average.
"""

from __future__ import annotations

import io
import json
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "scikit-image": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    "scikit-learn": ("china.jpg", "flower.jpg"),
}
Files = list[tuple[str, bytes]]  # (extension, bytes) of each member of a sample


def photographs() -> list[Image.Image]:
    found = []
    for package, names in PHOTOGRAPHS.items():
        try:
            listed = files(package) or []
        except PackageNotFoundError:
            raise SystemExit(f"{package} is not installed: pip install -c constraints.txt -e '.[demo]'") from None
        found += [Image.open(str(path.locate())).convert("RGB") for path in listed if path.name in names]
    return found


def samples(count: int, seed: int = 0) -> list[tuple[str, Files]]:
    """Captioned pictures as (key, files): a record and a JPEG each."""
    rng = np.random.default_rng(seed)
    sources = photographs()
    made: list[tuple[str, Files]] = []
    for number in range(count):
        source = sources[rng.integers(len(sources))]
        width, height = (int(side * rng.uniform(0.4, 1.0)) for side in source.size)
        left, top = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
        pixels = 540_000 * rng.uniform(0.4, 1.6)
        scale = (pixels / (width * height)) ** 0.5
        crop = source.resize(
            (round(width * scale), round(height * scale)),
            Image.Resampling.BICUBIC,
            box=(left, top, left + width, top + height),
        )
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=91)
        record = json.dumps({"domain": "image_text", "text": f"Picture {number}, {crop.width} x {crop.height} pixels."})
        made.append((f"{number:09d}", [("json", record.encode()), ("0.jpg", buffer.getvalue())]))
    return made


def load(folder: Path, count: int) -> list[tuple[str, Files]]:
    """The same samples, made once and kept in a folder: making 4,000 takes a minute."""
    kept = folder / f"pictures-{count}"
    if not kept.is_dir():
        temporary = folder / f"pictures-{count}.tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        for key, members in samples(count):
            for extension, data in members:
                (temporary / f"{key}.{extension}").write_bytes(data)
        temporary.rename(kept)
    return [
        (path.stem, [(extension, path.with_suffix(f".{extension}").read_bytes()) for extension in ("json", "0.jpg")])
        for path in sorted(kept.glob("*.json"))
    ]
