"""Prove on this machine that training works here: run once on a new machine, or after an update of its software.

    make demo-data
    python -m tools.accept                             all GPUs; without a GPU two processes on the CPU
    python -m tools.accept --ranks 4 --part layouts    a part of it

Trains the tiny model a few steps again and again, each time as a real run under torchrun, and compares:

    layouts    every kind of parallelism that fits --ranks, with one process
    backend    Transformer Engine and bf16 with torch and fp32
    resume     a run that was resumed, bit for bit, with one that was not
    export     the weights of a checkpoint with those of its export to Hugging Face and back, bit for bit

The result is a table, OUT/accept.json, and the exit code: 0 if everything passed, 1 if not. OUT keeps the log of every
run. A part that this machine cannot run, such as `backend` without a GPU, is listed as not run.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from common.files import write_json
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

if TYPE_CHECKING:  # it needs torch
    from tools.acceptance import Machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
CONFIG = Path("configs/tiny/pretrain.yaml")
MARKER = ".accept"  # in the folder of an earlier call


class AcceptError(ValueError):
    """The call is wrong."""


@app.command(help=keep_lines(__doc__))
def main(
    ranks: Annotated[int, typer.Option(min=0, help="processes, one per GPU; 0: all GPUs, or 2 without a GPU")] = 0,
    part: Annotated[list[str] | None, typer.Option(help="one of the parts above; may be repeated")] = None,
    config: Annotated[Path, typer.Option(help="configuration of a small model, with data")] = CONFIG,
    out: Annotated[Path, typer.Option(help="folder of the runs, which is replaced")] = Path("accept_out"),
    timeout: Annotated[int, typer.Option(min=1, help="seconds that one run may take")] = 600,
) -> None:
    from tools.acceptance import PARTS, Runs, this_machine

    with errors_in_one_line(AcceptError):
        machine = this_machine(ranks)
        parts = _chosen(part, PARTS, config, machine)
        _replace(out)
    console = Console(width=120)
    console.print(machine.description)
    checks = [check for name in parts for check in PARTS[name](machine)]
    runs = Runs(config, out, timeout)
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("checks", total=len(checks))
        for check in checks:
            progress.update(task, description=f"{check.part}: {check.name}")
            rows.append(check.run(runs))
            progress.advance(task)
    columns = ("part", "check", "result", "found", "limit", "seconds")
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    console.print(table)
    failed = [row for row in rows if row["result"] == "failed"]
    write_json(out / "accept.json", {"machine": machine.facts, "checks": rows, "passed": not failed})
    for row in rows:
        if row["reason"]:
            console.print(f"{row['result']}: {row['part']}, {row['check']}: {row['reason']}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _chosen(parts: list[str] | None, known: Collection[str], config: Path, machine: Machine) -> list[str]:
    """Return the parts to run, all that are known by default."""
    for part in parts or ():
        if part not in known:
            raise AcceptError(f"--part {part} is unknown; choose among {', '.join(known)}")
    if machine.gpus and machine.ranks > machine.gpus:
        raise AcceptError(f"--ranks {machine.ranks}: this machine has {machine.gpus} GPUs, one per process")
    if not config.is_file():
        raise AcceptError(f"--config {config} does not exist; run this from the root of the repository")
    return list(dict.fromkeys(parts or known))


def _replace(out: Path) -> None:
    """Remove what an earlier call left in `out`.

    Raises:
        AcceptError: It holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise AcceptError(f"--out {out} is not empty, and not the folder of an earlier call; give another")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


if __name__ == "__main__":
    run(app)
