"""Opening a source: a million samples in 10,000 shards.

    python -m benchmarks.indexing [--samples 1000000] [--shards 10000]

Writes indexes of samples like those of a pretraining mixture (captions, text, documents with several images, videos;
nearly every image has a different size), joins them in a catalogue, and opens the catalogue in new processes. Memory is
the growth of such a process: `anonymous` is what the columns of a Source take, `mapped` are the pages of the catalogue
and of libraries that were read, which the kernel may drop. Looking up a sample is measured in CPU time. The limits are
printed beside the figures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from data_pipeline.config import SourceConfig
from data_pipeline.loading.source import Source
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.media.video_files import VideoInfo
from data_pipeline.shards.catalogue import write_catalogue
from data_pipeline.shards.index import index_row, write_index
from data_pipeline.shards.members import Member, ShardSample

LIMITS = {"seconds": "at most 1", "MB anonymous": "both: at most 100"}
PATTERNS = 4000  # random samples; each row is one of them with other image sizes


def random_row(key: str, rng: np.random.Generator) -> dict:
    """Return a row of an index: of 20 samples, 10 are captions, 5 text, 4 documents with images and one a video."""
    kind = rng.integers(20)
    images = 1 if kind < 10 else int(rng.integers(2, 6)) if kind < 14 else 0
    videos = 1 if kind == 14 else 0
    text = int(rng.integers(20, 2000))
    sizes = [
        (int(h), int(w)) for h, w in zip(rng.integers(100, 2200, images), rng.integers(100, 2200, images), strict=True)
    ]
    seconds = float(rng.uniform(2, 200))
    infos = [(VideoInfo(int(seconds * 30), 30.0, seconds, 720, 1280), int(seconds))] * videos
    # Documents begin with two tokens; the text between images does not matter here.
    blocks = [(False, 2 + 2 * n, 2) for n in range(images)] + [(True, 2, 2 + 3 * int(seconds))] * videos
    members = [Member("json", 512, 300, 1)]
    members += [Member("video" if videos else "image", 4096 * n, 100_000, 12345) for n in range(images + videos)]
    domain = "video" if videos else "text" if not images else "interleaved" if images > 1 else "image_text"
    return index_row(ShardSample(key, members), domain, text, sizes, infos, blocks)


def write_folder(folder: Path, samples: int, shards: int) -> None:
    """Write the indexes of empty tars, `samples` rows in total, and their catalogue."""
    rng = np.random.default_rng(0)
    rows = [random_row(f"{n:09d}", rng) for n in range(PATTERNS)]
    per_shard = samples // shards
    for shard in range(shards):
        tar = folder / f"shard-{shard:05d}.tar"
        tar.write_bytes(bytes(1024))
        chosen = [rows[number] for number in rng.integers(0, PATTERNS, per_shard)]
        for row in chosen:
            row["images"] = [
                {"height": h, "width": w} for h, w in rng.integers(100, 2200, (len(row["images"]), 2)).tolist()
            ]
        write_index(tar, chosen, tokenizer_hash="t", chat_form="glm45v")
    write_catalogue(folder)


def open_source(folder: str) -> dict[str, float]:
    """Open a source in this process; return seconds, megabytes, and microseconds per lookup of a sample."""
    process = psutil.Process()
    before = process.memory_info()
    began, cpu = time.perf_counter(), time.process_time()
    source = Source(SourceConfig(folder), tokenizer_hash="t", budget=PixelBudget())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    after = process.memory_info()
    mapped = after.shared - before.shared
    return {
        "samples": len(source),
        "shards": len(source.shards),
        "seconds": seconds,
        "CPU seconds": cpu,
        "MB anonymous": (after.rss - before.rss - mapped) / 1e6,
        "MB mapped": mapped / 1e6,
        "us sample()": _microseconds(source.sample, len(source)),
        "us blocks()": _microseconds(source.blocks, len(source)),
    }


def _microseconds(lookup: Callable[[int], object], samples: int, times: int = 2000) -> float:
    rows = np.random.default_rng(0).integers(0, samples, times).tolist()
    began = time.process_time()
    for row in rows:
        lookup(row)
    return (time.process_time() - began) / times * 1e6


def in_new_process(folder: Path) -> dict[str, float]:
    """Return the figures of `open_source` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(open_source, str(folder)).result()


def main() -> None:
    """Print the figures of the fastest of three processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), options.samples, options.shards)
        measured = [in_new_process(Path(folder)) for _ in range(3)]
        best = min(measured, key=lambda figures: figures["seconds"])
        for name, value in best.items():
            print(f"{name:<16}{value:>14,.2f}  {LIMITS.get(name, '')}")
        print(f"{'MB on disk':<16}{(Path(folder) / 'catalogue.arrow').stat().st_size / 1e6:>14,.2f}")


if __name__ == "__main__":
    main()
