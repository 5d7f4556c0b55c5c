"""Reading samples without decoding them: ours, shuffled over all shards, against webdataset's, in order.

    python -m benchmarks.reading [--samples 4000] [--folder DIR]

Both hand out the bytes of every member of the same samples (benchmarks/jpegs.py), from the page cache: webdataset
from the shards that its ShardWriter makes, and from ours. Ours checks what it reads. The limits are copying the same
bytes out of the page cache in the same order, and that plus checking them. Last, the time to the first sample.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks")
    given = parser.parse_args()
    folder = given.folder / "reading"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    samples = load(given.folder, given.samples)
    with ShardWriter(folder, "shard", SHARD_BYTES) as writer:
        for key, members in samples:
            writer.write(key, members)
    with wds.ShardWriter(str(folder / "theirs-%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as theirs:
        for key, members in samples:
            theirs.write({"__key__": key, **dict(members)})
    index_shards(writer.finished)

    source = Source(SourceConfig(str(folder / "shard-*.tar")), tokenizer_hash="", budget=PixelBudget())
    stored = [source.sample(row) for row in np.random.default_rng(0).permutation(len(source)).tolist()]
    places = [(s.shard, [(m.offset, m.size) for m in s.sample.members]) for s in stored]
    megabytes = sum(size for _, members in places for _, size in members) / 1e6
    files = {path: os.open(path, os.O_RDONLY) for path, _ in places}

    def webdatasets(pattern: str) -> None:
        for _ in wds.WebDataset(sorted(map(str, folder.glob(pattern))), shardshuffle=False):
            pass

    def ours() -> None:
        reader = ShardReader()
        for sample in stored:
            reader.read_members(sample.shard, sample.sample, sample.tar_fingerprint)
        reader.close()

    def ours_from_the_source() -> None:
        reader = ShardReader()
        for row in np.random.default_rng(1).permutation(len(source)).tolist():
            sample = source.sample(row)
            reader.read(sample.shard, sample.sample, sample.tar_fingerprint)
        reader.close()

    def copies() -> None:
        for path, members in places:
            for offset, size in members:
                os.pread(files[path], size, offset)

    def copies_checked() -> None:
        for path, members in places:
            for offset, size in members:
                xxh3_64_intdigest(os.pread(files[path], size, offset))

    ways: dict[str, Callable[[], None]] = {
        "webdataset, its own shards": lambda: webdatasets("theirs-*.tar"),
        "webdataset, our shards": lambda: webdatasets("shard-*.tar"),
        "ours, shuffled": ours,
        "ours, with look-up and record": ours_from_the_source,
        "limit: copies": copies,
        "limit: copies, checked": copies_checked,
    }
    print(f"{len(stored)} samples, {megabytes:.0f} MB, best of {REPETITIONS}")
    print(f"{'':<34}{'samples a CPU-second':>22}{'GB a CPU-second':>18}{'ratio':>8}")
    costs = {name: cheapest(way, REPETITIONS) for name, way in ways.items()}
    base = costs["webdataset, its own shards"].cpu
    for name, spent in costs.items():
        rates = f"{len(stored) / spent.cpu:>22,.0f}{megabytes / 1e3 / spent.cpu:>18.2f}"
        print(f"{name:<34}{rates}{base / spent.cpu:>8.1f}")
    print(f"ours should be at least {LEAST_RATIO} times webdataset's from its own shards")

    began = time.perf_counter()
    again = Source(SourceConfig(str(folder / "shard-*.tar")), tokenizer_hash="", budget=PixelBudget())
    sample = again.sample(len(again) // 2)
    ShardReader().read_members(sample.shard, sample.sample)
    print(f"the first sample after opening the source: {1e3 * (time.perf_counter() - began):.1f} ms")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
