"""Building shards from records and JPEG files, with one process and with two.

    python -m benchmarks.sharding [--samples 4000] [--folder DIR]

Every image is decoded completely, so that damaged ones are rejected, and written with its checksums and index. The
limit is decoding the same images alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.jpegs import kept_folder, load
from benchmarks.timing import cheapest
from data_pipeline.media.image_files import decode_image
from data_pipeline.sharding.build import build_shards

REPETITIONS = 3
LEAST_SPEED_UP = 1.7


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks", help="for samples and shards"
    )
    options = parser.parse_args()
    samples = load(options.folder, options.samples)
    records = kept_folder(options.folder, options.samples) / "records.jsonl"
    lines = [{**json.loads(dict(files)["json"]), "images": [f"{key}.0.jpg"]} for key, files in samples]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = options.folder / "sharding"

    def build(workers: int) -> None:
        shutil.rmtree(out, ignore_errors=True)
        counts = build_shards([records], out, executor="processes", workers=workers).counts
        assert counts.samples == len(samples)

    def decode() -> None:
        for _, files in samples:
            decode_image(dict(files)["0.jpg"])

    timed: dict[str, Callable[[], None]] = {
        "1 process": lambda: build(1),
        "2 processes": lambda: build(2),
        "limit: decoding": decode,
    }
    print(f"{len(samples)} samples, best of {REPETITIONS}")
    print(f"{'':<18}{'samples per CPU-second':>24}{'samples per second':>20}")
    costs = {name: cheapest(work, REPETITIONS) for name, work in timed.items()}
    for name, cost in costs.items():
        print(f"{name:<18}{len(samples) / cost.cpu:>24,.0f}{len(samples) / cost.wall:>20,.0f}")
    one, two = costs["1 process"], costs["2 processes"]
    print(
        f"2 processes, wall time: {one.wall / two.wall:.2f} times as fast as 1 "
        f"(goal on two idle cores: {LEAST_SPEED_UP})"
    )
    print(f"1 process reaches {costs['limit: decoding'].cpu / one.cpu:.0%} of the speed of decoding alone")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
