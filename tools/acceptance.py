"""The checks of `tools.accept`: which runs are made, and what is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model.backend import device_count
from model.checkpoint import mark_latest
from model.installed import has_transformer_engine
from training.run_state import RUN_STATE
from training.start_point import CHECKPOINTS

STEPS = 4
RESUMED_AT = 2
KEYS = {
    "fp32": ["train.precision=fp32", "model.backend=torch"],
    "bf16": ["train.precision=bf16", "model.backend=transformer_engine"],
}

# Largest relative difference of a loss, and of a gradient norm. In fp32 only the order of sums differs between layouts;
# in bf16 each value has 8 bits, so that the limit only shows a fault of the layout.
LIMITS = {"fp32": {"loss": 1e-4, "grad_norm": 1e-3}, "bf16": {"loss": 1e-2, "grad_norm": 5e-2}}

SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
LAYOUTS = (
    "DP",
    "TP2 SP",
    "PP2",
    "PP2 VPP2",
    "CP2",
    "EP2",
    "ETP2",
    "TP2 SP EP2",
    "EP4",
    "CP4",
    "PP4",
    "TP2 SP PP2",
    "TP2 SP CP2",
    "PP2 CP2",
    "PP2 EP2",
    "CP2 EP4",
    "EP8",
    "TP2 SP PP2 EP2",
    "PP2 CP2 EP4",
    "TP2 SP CP2 EP4",
)


class CheckError(Exception):
    """A run did not end well, or what was compared differs; the text says what."""


class NotRun(Exception):
    """This machine cannot run a check; the text says why."""


@dataclass(frozen=True)
class Machine:
    """Where the checks run."""

    ranks: int
    gpus: int
    facts: dict[str, Any]

    @property
    def description(self) -> str:
        """Return a line for the user."""
        versions = ", ".join(f"{name} {version}" for name, version in self.facts["versions"].items())
        return f"{self.facts['device']}, {self.ranks} processes; {versions}"


def this_machine(ranks: int) -> Machine:
    """Return what this machine has; `ranks` is the user's number of processes, or 0."""
    gpus = device_count() or 0
    device = torch.cuda.get_device_name(0) if gpus else "no GPU (processes on the CPU)"
    names = ("torch", "megatron-core", "transformers", "transformer-engine")
    versions = {name: _version(name) for name in names}
    return Machine(ranks or gpus or 2, gpus, {"device": device, "gpus": gpus, "versions": versions})


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """Runs of the tiny model, each made once and kept with its log in a folder."""

    config: Path
    out: Path
    timeout: int
    made: dict[str, Path] = field(default_factory=dict)

    def train(self, name: str, processes: int, overrides: list[str], *, again: bool = False) -> Path:
        """Train and return the folder of the run; `again` starts a run once more, which resumes.

        Raises:
            CheckError: It did not end well.
        """
        if name in self.made and not again:
            return self.made[name]
        folder = self.out / name.replace(" ", "_")
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "pretrain.train"]
        self.command(name, [*launcher, "--config", str(self.config), f"train.output_dir={folder}", *overrides])
        if json.loads((folder / RUN_STATE).read_text())["state"] != "complete":
            raise CheckError(f"the run did not complete; see {self.log(name)}")
        self.made[name] = folder
        return folder

    def command(self, name: str, words: list[str]) -> None:
        """Run `python -m WORDS` and add its output to the log.

        Raises:
            CheckError: It failed, or took too long.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.out.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("a") as log:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", *words],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    timeout=self.timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise CheckError(f"no end after {self.timeout} s; see {self.log(name)}") from None
        if done.returncode:
            raise CheckError(f"exit code {done.returncode}; see {self.log(name)}")

    def log(self, name: str) -> Path:
        """Return the file that the output of a run goes to."""
        return self.out / f"{name.replace(' ', '_')}.log"


def values_of(run: Path) -> list[dict[str, float]]:
    """Return loss and gradient norm of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("loss", "grad_norm")} for line in lines]


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    part: str
    name: str
    limit: str
    compare: Callable[[Runs], str]  # returns what was found, or raises CheckError or NotRun

    def run(self, runs: Runs) -> dict[str, Any]:
        """Run the check and return its row."""
        began = time.monotonic()
        result, found, reason = "passed", "", ""
        try:
            found = self.compare(runs)
        except NotRun as error:
            result, reason = "not run", str(error)
        except CheckError as error:
            result, reason = "failed", str(error)
        seconds = round(time.monotonic() - began, 1)
        row = {"part": self.part, "check": self.name, "result": result, "found": found, "limit": self.limit}
        return {**row, "seconds": seconds, "reason": reason}


def layout_checks(machine: Machine) -> Iterator[Check]:
    """Yield the layouts that fit the number of processes, in fp32 and, where there is one, in Transformer Engine."""
    fitting = [name for name in LAYOUTS if fits(name, machine.ranks)]
    for precision in ("fp32", "bf16"):
        for name in fitting or ["all"]:
            yield Check("layouts", f"{name} {precision}", _limit(precision), _layout(name, precision, machine))


def _layout(name: str, precision: str, machine: Machine) -> Callable[[Runs], str]:
    def compare(runs: Runs) -> str:
        if machine.ranks == 1:
            raise NotRun("one process; give --ranks")
        common = options(precision, machine)
        alone = runs.train(f"one process {precision}", 1, common)
        split = runs.train(f"{name} {precision}", machine.ranks, [*common, *layout_options(name)])
        return difference(split, alone, precision)

    return compare


def backend_checks(machine: Machine) -> Iterator[Check]:
    """Yield the comparison of the backends."""

    def compare(runs: Runs) -> str:
        keys = {precision: options(precision, machine) for precision in LIMITS}
        runs_of = {name: runs.train(f"one process {name}", 1, overrides) for name, overrides in keys.items()}
        return difference(runs_of["bf16"], runs_of["fp32"], "bf16")

    yield Check("backend", "Transformer Engine, bf16, with torch, fp32", _limit("bf16"), compare)


def resume_checks(machine: Machine) -> Iterator[Check]:
    """Yield the comparison of a resumed run with one that was not disturbed, in each precision."""
    for precision in LIMITS:
        yield Check("resume", precision, "bit for bit", _resume(precision, machine))


def _resume(precision: str, machine: Machine) -> Callable[[Runs], str]:
    def compare(runs: Runs) -> str:
        name = f"resume {precision}"
        overrides = [*options(precision, machine, save_interval=RESUMED_AT), "train.deterministic=true"]
        folder = runs.train(name, machine.ranks, overrides)
        whole = values_of(folder)
        mark_latest(folder / CHECKPOINTS / f"step_{RESUMED_AT:07d}")
        resumed = values_of(runs.train(name, machine.ranks, overrides, again=True))
        if resumed != whole:
            raise CheckError(f"the resumed run has {resumed}, the undisturbed run {whole}")
        return "equal"

    return compare


def export_checks(machine: Machine) -> Iterator[Check]:
    """Yield the comparison of a checkpoint with what comes back from Hugging Face's format."""

    def compare(runs: Runs) -> str:
        folder = runs.train("export", machine.ranks, options("fp32", machine, save_interval=STEPS))
        there, back, again = (runs.out / name for name in ("hf", "imported", "hf_again"))
        runs.command("export", ["tools.convert", "export", "--checkpoint", str(folder), "--out", str(there)])
        runs.command("export", ["tools.convert", "import", "--hf", str(there), "--out", str(back)])
        runs.command("export", ["tools.convert", "export", "--checkpoint", str(back), "--out", str(again)])
        runs.command("export", ["tools.convert", "verify", str(there), str(again)])
        return "equal"

    yield Check("export", "to Hugging Face and back", "bit for bit", compare)


PARTS: dict[str, Callable[[Machine], Iterator[Check]]] = {
    "layouts": layout_checks,
    "backend": backend_checks,
    "resume": resume_checks,
    "export": export_checks,
}


# --- how a run is started and compared --------------------------------------------------------------------------------


def fits(layout: str, ranks: int) -> bool:
    """Return whether a layout divides a number of processes, and is more than one.

    >>> [layout for layout in ("DP", "TP2 SP", "CP2 EP4") if fits(layout, 2)]
    ['DP', 'TP2 SP']
    """
    sizes = _sizes(layout)
    pipeline = sizes.get("PP", 1)
    attention = pipeline * sizes.get("TP", 1) * sizes.get("CP", 1)
    experts = pipeline * sizes.get("EP", 1) * sizes.get("ETP", 1)
    return ranks > 1 and ranks % attention == 0 and ranks % experts == 0


def layout_options(layout: str) -> list[str]:
    """Return the keys of a layout.

    >>> layout_options("TP2 SP")
    ['parallel.tensor_model_parallel_size=2', 'parallel.sequence_parallel=true']
    """
    keys = [f"parallel.{SIZES[name]}={size}" for name, size in _sizes(layout).items()]
    return [*keys, "parallel.sequence_parallel=true"] if "SP" in layout.split() else keys


def _sizes(layout: str) -> dict[str, int]:
    words = [word for word in layout.split() if word[-1].isdigit()]
    return {word.rstrip("0123456789"): int(word.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")) for word in words}


def options(precision: str, machine: Machine, save_interval: int = 0) -> list[str]:
    """Return the keys of every run.

    Raises:
        NotRun: This machine has no Transformer Engine.
    """
    if precision == "bf16" and not (machine.gpus and has_transformer_engine()):
        raise NotRun("needs a GPU and Transformer Engine")
    batch = f"train.global_batch_size={max(2, machine.ranks)}"
    short = [f"train.steps={STEPS}", "optimizer.warmup_steps=1", f"checkpoint.save_interval={save_interval}"]
    return [*KEYS[precision], *short, batch]


def difference(run: Path, other: Path, precision: str) -> str:
    """Return the largest relative differences of two runs.

    Raises:
        CheckError: One is above the limit.
    """
    pairs = list(zip(values_of(run), values_of(other), strict=True))
    found = {
        key: max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for a, b in pairs) for key in ("loss", "grad_norm")
    }
    said = ", ".join(f"{key} {value:.1e}" for key, value in found.items())
    if any(not value <= LIMITS[precision][key] for key, value in found.items()):  # NaN is above every limit
        raise CheckError(f"{said} above the limit; compare {run}/metrics.jsonl with {other}/metrics.jsonl")
    return said


def _limit(precision: str) -> str:
    return ", ".join(f"{key} {value:.0e}" for key, value in LIMITS[precision].items())
