"""Reading samples without decoding them: glmv-train, shuffled over all shards, against webdataset, in order.

    python -m benchmarks.reading [--samples 4000] [--folder DIR]

Both return the bytes of every member of the same samples (benchmarks/jpegs.py), from the page cache: webdataset from
the shards of its own ShardWriter and from those of glmv-train. glmv-train also checks the bytes. The limits are copying
the same bytes out of the page cache in the same order, and copying and checking them. The last line is the time to the
first sample.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset as wds
from xxhash import xxh3_64_intdigest

from benchmarks.jpegs import load
from benchmarks.timing import cheapest
from data_pipeline.config import SourceConfig
from data_pipeline.loading.source import Source
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardWriter

SHARD_BYTES = 50 << 20
REPETITIONS = 5
LEAST_RATIO = 10.0


def write_shards(folder: Path, samples_folder: Path, count: int) -> None:
    """Write the samples twice: as shard-*.tar with indexes, and by webdataset as webdataset-*.tar."""
    samples = load(samples_folder, count)
    with ShardWriter(folder, "shard", SHARD_BYTES) as writer:
        for key, members in samples:
            writer.write(key, members)
    with wds.ShardWriter(str(folder / "webdataset-%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as other:
        for key, members in samples:
            other.write({"__key__": key, **dict(members)})
    index_shards(writer.finished)


def open_source(folder: Path) -> Source:
    """Open the indexed shards."""
    return Source(SourceConfig(str(folder / "shard-*.tar")), tokenizer_hash="", budget=PixelBudget())


def contenders(folder: Path, source: Source) -> tuple[dict[str, Callable[[], None]], float]:
    """Return what is timed, by name, and the megabytes that each reads."""
    stored = [source.sample(row) for row in np.random.default_rng(0).permutation(len(source)).tolist()]
    ranges = [(s.shard, [(m.offset, m.size) for m in s.sample.members]) for s in stored]
    megabytes = sum(size for _, members in ranges for _, size in members) / 1e6
    files = {path: os.open(path, os.O_RDONLY) for path, _ in ranges}

    def read_webdataset(pattern: str) -> None:
        for _ in wds.WebDataset(sorted(map(str, folder.glob(pattern))), shardshuffle=False):
            pass

    def read_members() -> None:
        reader = ShardReader()
        for sample in stored:
            reader.read_members(sample.shard, sample.sample, sample.tar_fingerprint)
        reader.close()

    def look_up_and_read() -> None:
        reader = ShardReader()
        for row in np.random.default_rng(1).permutation(len(source)).tolist():
            sample = source.sample(row)
            reader.read(sample.shard, sample.sample, sample.tar_fingerprint)
        reader.close()

    def copy() -> None:
        for path, members in ranges:
            for offset, size in members:
                os.pread(files[path], size, offset)

    def copy_and_check() -> None:
        for path, members in ranges:
            for offset, size in members:
                xxh3_64_intdigest(os.pread(files[path], size, offset))

    return {
        "webdataset, its own shards": lambda: read_webdataset("webdataset-*.tar"),
        "webdataset, shards of glmv-train": lambda: read_webdataset("shard-*.tar"),
        "glmv-train, shuffled": read_members,
        "the same, with lookup and record": look_up_and_read,
        "limit: copy": copy,
        "limit: copy and check": copy_and_check,
    }, megabytes


def main() -> None:
    """Print the table and the time to the first sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks", help="for samples and shards"
    )
    options = parser.parse_args()
    folder = options.folder / "reading"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_shards(folder, options.folder, options.samples)
    source = open_source(folder)
    timed, megabytes = contenders(folder, source)
    print(f"{len(source)} samples, {megabytes:.0f} MB, best of {REPETITIONS}")
    print(f"{'':<34}{'samples per CPU-second':>24}{'GB per CPU-second':>20}{'ratio':>8}")
    costs = {name: cheapest(work, REPETITIONS) for name, work in timed.items()}
    base = costs["webdataset, its own shards"].cpu
    for name, cost in costs.items():
        rates = f"{len(source) / cost.cpu:>24,.0f}{megabytes / 1e3 / cost.cpu:>20.2f}"
        print(f"{name:<34}{rates}{base / cost.cpu:>8.1f}")
    print(f"goal: {LEAST_RATIO} times webdataset on its own shards")

    began = time.perf_counter()
    reopened = open_source(folder)
    sample = reopened.sample(len(reopened) // 2)
    ShardReader().read_members(sample.shard, sample.sample)
    print(f"from opening the source to the first sample: {1e3 * (time.perf_counter() - began):.1f} ms")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
