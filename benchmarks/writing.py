"""Writing shards: ours, with the checksum of every member for the index, against webdataset's ShardWriter.

    python -m benchmarks.writing [--samples 4000] [--folder DIR]

Both write the same captioned pictures (benchmarks/jpegs.py) from memory. The limits are how fast the file system
takes the same bytes in one plain file, and that plus a checksum of every member.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import webdataset as wds
from xxhash import xxh3_64_intdigest

from benchmarks.jpegs import Files, load
from benchmarks.timing import Cost, cheapest, cost
from data_pipeline.shards.writer import ShardWriter

SHARD_BYTES = 50 << 20
REPETITIONS = 5
LEAST_RATIO, LEAST_SCALING = 3.0, 1.7

Samples = list[tuple[str, Files]]


def ours(samples: Samples, folder: Path) -> None:
    with ShardWriter(folder, "ours", SHARD_BYTES) as writer:
        for key, files in samples:
            writer.write(key, files)


def webdatasets(samples: Samples, folder: Path) -> None:
    with wds.ShardWriter(str(folder / "theirs-%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for key, files in samples:
            writer.write({"__key__": key, **dict(files)})


def plain(samples: Samples, folder: Path) -> None:
    """The same bytes without headers."""
    with open(folder / "plain", "wb", buffering=0) as file:
        for _, files in samples:
            for _, data in files:
                file.write(data)


def plain_with_checksums(samples: Samples, folder: Path) -> None:
    plain(samples, folder)
    for _, files in samples:
        for _, data in files:
            xxh3_64_intdigest(data)


WAYS: dict[str, Callable[[Samples, Path], None]] = {
    "webdataset ShardWriter": webdatasets,
    "ours, checksums for the index": ours,
    "limit: one plain file": plain,
    "limit: the same, and checksums": plain_with_checksums,
}


def afresh(way: Callable[[Samples, Path], None], samples: Samples, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    way(samples, folder)


def in_processes(way: Callable[[Samples, Path], None], count: int, samples: Samples, folder: Path) -> None:
    """Every process writes all of the samples, to a folder of its own."""
    context = multiprocessing.get_context("fork")  # so that the samples need not travel
    writers = [context.Process(target=afresh, args=(way, samples, folder / str(n))) for n in range(count)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        if writer.exitcode:
            raise SystemExit(f"a process that wrote to {folder} ended with {writer.exitcode}")


def _wall(run: Cost) -> float:
    return run.wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks")
    given = parser.parse_args()
    samples = load(given.folder, given.samples)
    megabytes = sum(len(data) for _, files in samples for _, data in files) / 1e6
    out = given.folder / "writing"

    print(f"{len(samples)} samples, {megabytes:.0f} MB, best of {REPETITIONS}")
    print(f"{'':<34}{'MB a CPU-second':>16}{'MB a second':>14}{'ratio':>8}")
    costs = {name: cheapest(partial(afresh, way, samples, out), REPETITIONS) for name, way in WAYS.items()}
    base = costs["webdataset ShardWriter"].cpu
    for name, spent in costs.items():
        print(f"{name:<34}{megabytes / spent.cpu:>16,.0f}{megabytes / spent.wall:>14,.0f}{base / spent.cpu:>8.2f}")
    print(f"ours should be at least {LEAST_RATIO} times webdataset's")

    for name in ("ours, checksums for the index", "limit: one plain file"):
        one, two = (
            min((cost(partial(in_processes, WAYS[name], count, samples, out)) for _ in range(REPETITIONS)), key=_wall)
            for count in (1, 2)
        )
        print(f"{name}: two processes write {2 * one.wall / two.wall:.2f} times as much as one at once, ", end="")
        print(f"for {two.cpu / one.cpu / 2:.2f} times the processor time a byte")
    print(f"ours should reach {LEAST_SCALING} on two idle cores")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
