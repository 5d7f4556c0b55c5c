"""From shards of images to patches, in samples per CPU-second of one core, against other tools on the same shards.

    python -m benchmarks.images --folder /tmp/images --peers-python .venv-peers/bin/python

glmv-train does what a data worker does: look up a row of the index, in random order, read and check its bytes, decode,
resize to the model's size, cut into uint8 patches. The peers read in order and end with transformers' pixel values.
They need an environment of their own (benchmarks/requirements.txt); without it, only glmv-train is timed. The limits
are the JPEG decoder alone, and copying the patches once.

The first run fills the folder: 4,000 JPEGs cut from photographs that scikit-image and scikit-learn contain, with a mean
of 0.54 megapixels, in 8 webdataset shards. Times are CPU time of the whole process, the best of several rounds: other
programs disturb it less than wall time, but they share caches and memory.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.jpegs import jpegs
from common.malloc import keep_freed_memory
from data_pipeline.media.image_files import decode_image
from data_pipeline.media.image_sizes import resized_size
from data_pipeline.media.images import as_frames, image_patches, patchify, resize
from data_pipeline.shards.index import read_index
from data_pipeline.shards.reader import ShardReader

SAMPLES, SHARDS = 4000, 8
MAX_TOKENS = 6144
PEERS = {
    "webdataset + Pillow + transformers (PIL)": "webdataset+pil+1",
    "Megatron-Energon + Pillow + transformers (PIL)": "energon+pil+1",
    "webdataset + Pillow + transformers (torchvision)": "webdataset+torchvision+1",
    "the same, 8 images per call": "webdataset+torchvision+8",
}
OWN = "glmv-train"
console = Console()


@dataclass(frozen=True)
class Timed:
    """What one contender did."""

    samples: int
    patches: int
    seconds: float  # CPU time

    @property
    def rate(self) -> float:
        """Patches per second. The contenders read different images, unless --samples asks for all."""
        return self.patches / self.seconds


# --- the shards -------------------------------------------------------------------------------------------------------


def make_shards(folder: Path) -> None:
    """Write and index the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    made = jpegs()
    for shard in track(range(SHARDS), "making the shards"):
        with tarfile.open(folder / f"images-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * SAMPLES // SHARDS, (shard + 1) * SAMPLES // SHARDS):
                for name, data in ((f"{number:06d}.jpg", next(made)), (f"{number:06d}.txt", b"A photograph.")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    subprocess.run([sys.executable, "-m", "tools.shard", "index", str(folder)], check=True, stdout=subprocess.DEVNULL)


# --- glmv-train -------------------------------------------------------------------------------------------------------


def raw_images(folder: Path, samples: int) -> Iterator[bytes]:
    """Yield the bytes of the first images, the ones that the peers read, in random order."""
    indexes = [read_index(tar) for tar in sorted(folder.glob("*.tar"))]
    reader = ShardReader()
    for number in np.random.default_rng(1).permutation(samples).tolist():
        index = indexes[number * SHARDS // SAMPLES]
        yield reader.read(str(index.file), index.sample(number % (SAMPLES // SHARDS))).images[0]


def time_own(folder: Path, samples: int) -> Timed:
    """Time glmv-train."""
    made = (len(image_patches(data, MAX_TOKENS)[0]) for data in raw_images(folder, samples))
    began = time.process_time()
    patches = sum(made)
    return Timed(samples, patches, time.process_time() - began)


def stages(folder: Path, samples: int) -> list[tuple[str, float, str]]:
    """Return the name of each stage, its seconds per image, and its rate."""

    def timed(stage: Callable, arguments: list) -> tuple[list, float]:
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            results = [stage(*argument) for argument in arguments]
            best = min(best, time.process_time() - began)
        return results, best / len(arguments)

    began = time.process_time()
    files = list(raw_images(folder, samples))
    read = (time.process_time() - began) / samples
    _, bare = timed(lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB"), [(data,) for data in files])
    decoded, decode = timed(decode_image, [(data,) for data in files])
    frames = [as_frames(rgb) for rgb in decoded]
    sizes = [resized_size(*rgb.shape[:2], max_tokens=MAX_TOKENS) for rgb in decoded]
    resized, resizing = timed(resize, list(zip(frames, sizes, strict=True)))
    slices, cutting = timed(patchify, [(image,) for image in resized])
    _, copying = timed(torch.clone, [(image,) for image in slices])
    megabytes = sum(len(data) for data in files) / samples / 1e6
    megapixels = sum(rgb.shape[0] * rgb.shape[1] for rgb in decoded) / samples / 1e6
    moved = sum(image.numel() for image in slices) / samples / 1e9
    return [
        ("index row, read, checksum", read, f"{megabytes / read:,.0f} MB/s, {megabytes * 1e3:.0f} kB each"),
        ("decode", decode, f"{megapixels / decode:,.0f} megapixels/s, {megapixels:.2f} each"),
        (
            "  the JPEG decoder alone",
            bare,
            f"{megapixels / bare:,.0f} megapixels/s: the limit, {1 / bare:,.0f} images/s",
        ),
        ("resize", resizing, f"{megapixels / resizing:,.0f} megapixels/s"),
        ("patchify", cutting, f"{moved / cutting:.1f} GB/s of patches"),
        ("  copying the patches once", copying, f"{moved / copying:.1f} GB/s: the limit of the memory"),
    ]


# --- the comparison ---------------------------------------------------------------------------------------------------


def time_peer(python: str, contender: str, folder: Path, samples: int) -> Timed | str:
    """Time a peer. Returns the last line of its error output if it fails."""
    script = Path(__file__).with_name("image_peers.py")
    command = [python, str(script), contender, str(folder), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Timed(**json.loads(done.stdout.strip().splitlines()[-1]))


def prepare_energon(python: str, folder: Path) -> None:
    """Run `energon prepare` on the shards, once."""
    energon = Path(python).with_name("energon")
    if energon.exists() and not (folder / ".nv-meta").exists():
        options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
        subprocess.run([str(energon), "prepare", str(folder), *options], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of the shards (440 MB); filled if it is empty"
    )
    parser.add_argument("--peers-python", help="Python of an environment with benchmarks/requirements.txt")
    parser.add_argument("--samples", type=int, default=1000, help="images per round")
    parser.add_argument("--rounds", type=int, default=2, help="the best one counts")
    options = parser.parse_args()
    if not 1 <= options.samples <= SAMPLES:
        parser.error(f"--samples {options.samples}: give 1 to {SAMPLES}")
    torch.set_num_threads(1)
    keep_freed_memory()  # as data workers do
    if not list(options.folder.glob("*.tar")):
        make_shards(options.folder)
    if options.peers_python:
        prepare_energon(options.peers_python, options.folder)

    best: dict[str, Timed] = {}
    failed: dict[str, str] = {}
    for _ in range(options.rounds):
        rounds: dict[str, Timed | str] = {OWN: time_own(options.folder, options.samples)}
        if options.peers_python:
            for name, contender in PEERS.items():
                rounds[name] = time_peer(options.peers_python, contender, options.folder, options.samples)
        for name, timed in rounds.items():
            if isinstance(timed, str):
                failed[name] = timed
            elif name not in best or timed.rate > best[name].rate:
                best[name] = timed

    table = Table("images to patches", "samples per CPU-second", "patches per CPU-second", "glmv-train is")
    for name, timed in best.items():
        ratio = f"{best[OWN].rate / timed.rate:.1f} times as fast" if name != OWN else ""
        table.add_row(name, f"{timed.samples / timed.seconds:,.1f}", f"{timed.rate:,.0f}", ratio)
    console.print(table)
    for name, message in failed.items():
        console.print(f"{name}: {message}", markup=False)
    if not options.peers_python:
        console.print("the peers need --peers-python: see benchmarks/requirements.txt")
    limits = Table("stage of glmv-train", "ms per image", "rate")
    for stage, seconds, rate in stages(options.folder, min(options.samples, 200)):
        limits.add_row(stage, f"{seconds * 1e3:.2f}", rate)
    console.print(limits)


if __name__ == "__main__":
    main()
