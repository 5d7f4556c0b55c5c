"""Writing shards: glmv-train, with a checksum of every member for the index, against webdataset's ShardWriter.

    python -m benchmarks.writing [--samples 4000] [--folder DIR]

Both write the same captioned images (benchmarks/jpegs.py) from memory. The limits are writing the same bytes to one
plain file, and that plus a checksum of every member.
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


def write_shards(samples: Samples, folder: Path) -> None:
    """Write shards as `tools.shard build` does."""
    with ShardWriter(folder, "shard", SHARD_BYTES) as writer:
        for key, files in samples:
            writer.write(key, files)


def write_webdataset(samples: Samples, folder: Path) -> None:
    """Write shards by webdataset."""
    with wds.ShardWriter(str(folder / "webdataset-%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for key, files in samples:
            writer.write({"__key__": key, **dict(files)})


def write_plain(samples: Samples, folder: Path) -> None:
    """Write the same bytes without headers to one file."""
    with open(folder / "plain", "wb", buffering=0) as file:
        for _, files in samples:
            for _, data in files:
                file.write(data)


def write_plain_with_checksums(samples: Samples, folder: Path) -> None:
    """Write the same file, and compute a checksum of every member."""
    write_plain(samples, folder)
    for _, files in samples:
        for _, data in files:
            xxh3_64_intdigest(data)


CONTENDERS: dict[str, Callable[[Samples, Path], None]] = {
    "webdataset ShardWriter": write_webdataset,
    "glmv-train, with checksums": write_shards,
    "limit: one plain file": write_plain,
    "limit: the same, with checksums": write_plain_with_checksums,
}


def write_to_new_folder(write: Callable[[Samples, Path], None], samples: Samples, folder: Path) -> None:
    """Empty the folder, then write."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write(samples, folder)


def write_in_processes(write: Callable[[Samples, Path], None], count: int, samples: Samples, folder: Path) -> None:
    """Write all samples in each of `count` processes at the same time, each to its own folder."""
    context = multiprocessing.get_context("fork")  # so the samples are not sent to the processes
    writers = [
        context.Process(target=write_to_new_folder, args=(write, samples, folder / str(number)))
        for number in range(count)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        if writer.exitcode:
            raise SystemExit(f"error: a process that wrote to {folder} ended with exit status {writer.exitcode}")


def _wall(run: Cost) -> float:
    return run.wall


def main() -> None:
    """Print the table, and how well two processes share the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks", help="for samples and shards"
    )
    options = parser.parse_args()
    samples = load(options.folder, options.samples)
    megabytes = sum(len(data) for _, files in samples for _, data in files) / 1e6
    out = options.folder / "writing"

    print(f"{len(samples)} samples, {megabytes:.0f} MB, best of {REPETITIONS}")
    print(f"{'':<36}{'MB per CPU-second':>19}{'MB per second':>15}{'ratio':>8}")
    costs = {
        name: cheapest(partial(write_to_new_folder, write, samples, out), REPETITIONS)
        for name, write in CONTENDERS.items()
    }
    base = costs["webdataset ShardWriter"].cpu
    for name, spent in costs.items():
        print(f"{name:<36}{megabytes / spent.cpu:>19,.0f}{megabytes / spent.wall:>15,.0f}{base / spent.cpu:>8.2f}")
    print(f"goal: {LEAST_RATIO} times webdataset")

    for name in ("glmv-train, with checksums", "limit: one plain file"):
        one, two = (
            min(
                (cost(partial(write_in_processes, CONTENDERS[name], count, samples, out)) for _ in range(REPETITIONS)),
                key=_wall,
            )
            for count in (1, 2)
        )
        print(f"{name}: two processes write {2 * one.wall / two.wall:.2f} times as much per second as one, ", end="")
        print(f"with {two.cpu / one.cpu / 2:.2f} times the CPU time per byte")
    print(f"goal on two idle cores: {LEAST_SCALING}")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
