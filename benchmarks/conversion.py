"""Convert a large model within a limit of memory, against `cp` of the same bytes and against transformers.

    python -m benchmarks.conversion [--folder DIR] [--layers 3] [--max-memory 2GiB] [--variant NAME] [--peer]

Makes a Hugging Face folder with the published widths and `--layers` decoder layers (GLM-4.1V with 3: 5.5 GB, with all
40: 20 GB), imports it, exports the checkpoint and compares both folders bit for bit. Each time begins with a cold cache
(as root) and ends with everything on disk. The memory is that of the whole process tree, looked at every 20 ms: the sum
of the resident memory of its processes, as the kernel gives it. Limits: 1.5 times `cp`, and the memory limit + 10%.

`--peer` also runs `from_pretrained` and `save_pretrained` of transformers, which read and write the same bytes. Limits
for each of import and export: its time, and a quarter of its memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.files import sync_file, sync_folder, write_json
from common.sizes import parse_size
from model.config import GlmvConfig
from model.weights.table import hf_shapes
from streaming.hf_job import HfJob
from streaming.limits import plan_limits
from streaming.run import convert

POLL_SECONDS = 0.02
PATTERN = 1_000_003  # values after which the synthetic weights repeat

PEER = """
import sys
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="auto")
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


class Run(NamedTuple):
    """What a command took."""

    seconds: float
    peak: int  # bytes


class SyntheticWeights:
    """Weights of any size that are made as fast as they are written, with other values in every row."""

    def __init__(self, config: GlmvConfig) -> None:
        self._shapes = hf_shapes(config)
        generator = torch.Generator().manual_seed(0)
        self._values = torch.empty(PATTERN + 2**26).normal_(0.0, 0.02, generator=generator).bfloat16()

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return torch.bfloat16

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor."""
        shape = (stop - start, *self._shapes[name][1:])
        width = torch.Size(shape[1:]).numel()
        first = (hash_of(name) + start * width) % PATTERN
        return self._values[first : first + torch.Size(shape).numel()].view(shape)

    def where(self, name: str) -> str:
        """Return where a tensor comes from."""
        return "synthetic weights"


def hash_of(name: str) -> int:
    """Return a number that is the same in every process."""
    return int.from_bytes(name.encode()[-8:], "little")


def make_folder(folder: Path, variant: str, layers: int) -> None:
    """Make the Hugging Face folder."""
    config = GlmvConfig.from_preset(variant)
    config = replace(config, decoder=replace(config.decoder, num_hidden_layers=layers))
    limits = plan_limits("4GiB", 1)
    job = HfJob(
        SyntheticWeights(config),
        dtype_of=lambda name: torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16,
        max_shard_bytes=5 * 10**9,
        block_bytes=limits.block_bytes,
        checksum="xxh3",
        identity={},
        hf_files=lambda inside: write_json(inside / "config.json", {**config.to_hf(), "dtype": "bfloat16"}),
    )
    convert(job, folder, limits, "making")


def measured(command: list[str], *, cold: bool = True) -> Run:
    """Run a command, and watch its process tree. `cold` begins with an empty cache."""
    if cold:
        drop_caches()
    started = time.perf_counter()
    process = psutil.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process))
        time.sleep(POLL_SECONDS)
    os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Run(seconds, peak)


def tree_memory(process: psutil.Process) -> int:
    """Return the resident memory of a process and all below it."""
    total = 0
    for each in (process, *_below(process)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def copy(source: Path, target: Path) -> Run:
    """Copy with `cp`, until everything is on disk."""
    drop_caches()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        sync_folder(path) if path.is_dir() else sync_file(path)
    return Run(time.perf_counter() - started, 0)


def drop_caches() -> None:
    """Write everything to disk and empty the page cache, as far as the user may."""
    os.sync()
    cache = Path("/proc/sys/vm/drop_caches")
    if os.access(cache, os.W_OK):
        cache.write_text("3")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmv-benchmarks")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--max-memory", default="2GiB")
    parser.add_argument("--variant", default="glm41v_9b")
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    folder = options.folder / "conversion"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hf, checkpoint, exported = folder / "hf", folder / "checkpoint", folder / "exported"
    make_folder(hf, options.variant, options.layers)
    nbytes = sum(path.stat().st_size for path in hf.rglob("*"))
    limit = ["--max-memory", options.max_memory]
    convert_command = [sys.executable, "-m", "tools.convert"]
    copies = [copy(hf, folder / "copy").seconds]
    shutil.rmtree(folder / "copy")
    imported = measured([*convert_command, "import", "--hf", str(hf), "--out", str(checkpoint), *limit])
    copies.append(copy(hf, folder / "copy").seconds)
    shutil.rmtree(folder / "copy")
    export = measured([*convert_command, "export", "--checkpoint", str(checkpoint), "--out", str(exported), *limit])
    subprocess.run([*convert_command, "verify", str(hf), str(exported)], check=True)
    peer = measured([sys.executable, "-c", PEER, str(hf), str(folder / "peer")]) if options.peer else None
    table = Table(title=f"{nbytes / 1e9:.1f} GB, --max-memory {options.max_memory}")
    for title in ("what", "seconds", "of cp", "peak MiB", "of the limit"):
        table.add_column(title, justify="right" if title != "what" else "left")
    most = parse_size(options.max_memory)
    table.add_row("cp", " ".join(f"{seconds:.1f}" for seconds in copies), "", "", "")
    if peer is not None:
        table.add_row("transformers", f"{peer.seconds:.1f}", "", f"{peer.peak / 2**20:,.0f}", "")
    for what, run, reference in (("import", imported, copies[0]), ("export", export, copies[1])):
        ratio = f"{run.seconds / reference:.2f}"
        table.add_row(what, f"{run.seconds:.1f}", ratio, f"{run.peak / 2**20:,.0f}", f"{run.peak / most:.2f}")
    Console().print(table)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
