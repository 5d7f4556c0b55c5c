"""Building shards from records and JPEG files, by one process and by two.

    python -m benchmarks.sharding [--samples 4000] [--folder DIR]

Every picture is decoded whole, so that no damaged one gets in, and everything is written with its checksums and its
index. The limit is decoding the same pictures and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.jpegs import load
from benchmarks.timing import cheapest
from data_pipeline.media.images import decode_image
from data_pipeline.sharding.build import build_shards

REPETITIONS = 3
LEAST_SPEED_UP = 1.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks")
    arguments = parser.parse_args()
    samples = load(arguments.folder, arguments.samples)
    records = arguments.folder / f"pictures-{arguments.samples}" / "records.jsonl"
    lines = [{**json.loads(dict(files)["json"]), "images": [f"{key}.0.jpg"]} for key, files in samples]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = arguments.folder / "sharding"

    def build(workers: int) -> None:
        shutil.rmtree(out, ignore_errors=True)
        counts = build_shards([records], out, executor="processes", workers=workers).counts
        assert counts.samples == len(samples)

    def decode() -> None:
        for _, files in samples:
            decode_image(dict(files)["0.jpg"])

    ways: dict[str, Callable[[], None]] = {
        "1 process": lambda: build(1),
        "2 processes": lambda: build(2),
        "limit: decoding": decode,
    }
    print(f"{len(samples)} samples, best of {REPETITIONS}")
    print(f"{'':<18}{'samples a CPU-second':>22}{'samples a second':>18}")
    costs = {name: cheapest(way, REPETITIONS) for name, way in ways.items()}
    for name, spent in costs.items():
        print(f"{name:<18}{len(samples) / spent.cpu:>22,.0f}{len(samples) / spent.wall:>18,.0f}")
    one, two = costs["1 process"], costs["2 processes"]
    print(f"2 processes on the wall: {one.wall / two.wall:.2f} times one (on two idle cores at least {LEAST_SPEED_UP})")
    print(f"of decoding alone: {costs['limit: decoding'].cpu / one.cpu:.0%} of its speed")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
