"""Check the machines of a job before it starts. The job scripts in slurm/ call it.

    python -m tools.check_node --gpus 8 --output-dir RUN        this machine: imports, GPUs, shared memory, disk
    torchrun ... -m tools.check_node --all-reduce --gpus 8      the network: a sum over all processes

A machine that fails is named on a line "bad node NAME: reason", and the exit code is 1.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from common.sizes import parse_size
from tools.errors import run
from tools.help_text import keep_lines

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
MODULES = ("torch", "megatron.core", "transformers", "omegaconf", "av")
SHM = Path("/dev/shm")
ALL_REDUCE_BYTES = 64 << 20
ALL_REDUCE_ROUNDS = 5


@app.command(help=keep_lines(__doc__))
def main(
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that the machine must have; 0: it computes on CPUs")] = 0,
    output_dir: Annotated[Path, typer.Option(help="folder of the run, which must be writable")] = Path("."),
    min_shm: Annotated[str, typer.Option(help="free shared memory (/dev/shm), which the loader needs")] = "64MiB",
    min_disk: Annotated[str, typer.Option(help="free space on the disk of --output-dir")] = "1GiB",
    all_reduce: Annotated[bool, typer.Option("--all-reduce", help="under torchrun: check the network")] = False,
    timeout: Annotated[int, typer.Option(min=1, help="seconds that the network may take")] = 300,
) -> None:
    try:
        sizes = parse_size(min_shm), parse_size(min_disk)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if all_reduce:
        problems = list(check_network(bool(gpus), timeout))
    else:
        problems = [
            *check_imports(),
            *check_gpus(gpus),
            *check_space(SHM, sizes[0]),
            *check_output(output_dir, sizes[1]),
        ]
    for problem in problems:
        print(f"bad node {node_name()}: {problem}", flush=True)
    if problems and all_reduce:
        os._exit(1)  # a process group that has failed may wait for ever at its end
    if problems:
        raise typer.Exit(1)
    if not all_reduce:
        print(f"node {node_name()}: imports, {gpus} GPUs, shared memory and disk are in order", flush=True)


def node_name() -> str:
    """Return the name that SLURM has for this machine, or else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# --- one machine: each check yields what is wrong ---------------------------------------------------------------------


def check_imports() -> Iterator[str]:
    """Check that the libraries of a run can be loaded."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a damaged library may raise anything
            reason = (str(error).splitlines() or [""])[0]
            yield f"{name} cannot be imported: {type(error).__name__}: {reason}"
            return


def check_gpus(wanted: int) -> Iterator[str]:
    """Check that the GPUs are seen, and that each computes."""
    if not wanted:
        return
    import torch

    seen = torch.cuda.device_count()
    if seen < wanted:
        yield f"{seen} GPUs are seen, and the job wants {wanted}"
        return
    for number in range(wanted):
        try:
            total = float(
                torch.ones(1024, 1024, device=f"cuda:{number}")
                .matmul(torch.ones(1024, 1, device=f"cuda:{number}"))
                .sum()
            )
        except RuntimeError as error:
            yield f"GPU {number} cannot be used: {str(error).splitlines()[0]}"
            continue
        if total != 1024.0**2:
            yield f"GPU {number} computes 1024 x 1024 = {total}"


def check_space(folder: Path, wanted: int) -> Iterator[str]:
    """Check the free space of a file system."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        yield f"{folder} has {free >> 20} MiB free, and the job wants {wanted >> 20} MiB"


def check_output(folder: Path, min_free: int) -> Iterator[str]:
    """Check that the run's folder, or the nearest folder above it that exists, takes a file and has space."""
    inside = folder.absolute()
    while not inside.is_dir() and inside != inside.parent:
        inside = inside.parent
    try:
        with tempfile.NamedTemporaryFile(dir=inside, prefix=".check_node_") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield f"{inside} cannot be written: {error.strerror}"
        return
    yield from check_space(inside, min_free)


# --- all machines -----------------------------------------------------------------------------------------------------


def check_network(on_gpus: bool, timeout: int) -> Iterator[str]:
    """Sum numbers over all processes, some times, and compare with the true sum."""
    import torch
    import torch.distributed as dist

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(f"cuda:{local_rank}" if on_gpus else "cpu")
    try:
        if on_gpus:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(seconds=timeout))
        rank, size = dist.get_rank(), dist.get_world_size()
        numbers = torch.empty(ALL_REDUCE_BYTES // 4, device=device)
        seconds = 0.0
        for _ in range(ALL_REDUCE_ROUNDS):
            numbers.fill_(rank + 1)
            started = time.perf_counter()
            dist.all_reduce(numbers)
            low, high = float(numbers.min()), float(numbers.max())
            seconds = time.perf_counter() - started
            if low != high or low != size * (size + 1) / 2:
                yield f"an all-reduce over {size} processes gave {low} to {high} instead of {size * (size + 1) / 2}"
                return
        if rank == 0:
            print(
                f"network: {size} processes, {ALL_REDUCE_BYTES / seconds / 1e9:.1f} GB/s in an all-reduce", flush=True
            )
        dist.destroy_process_group()
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):  # the peer says what happened
            yield f"the processes cannot communicate: {str(error).splitlines()[0]}"
        else:
            os._exit(1)


if __name__ == "__main__":
    run(app)
