"""The whole pipeline in minutes on two CPU cores: `python -m demo [--variant dense]`, or `make demo`.

Real images, videos and texts are sharded. A tiny GLM-4.5V (or GLM-4.1V) is pretrained on two processes, continued at a
longer context with video, fine-tuned on chats and exported. transformers loads the export, must compute the same loss
as training, and must answer questions about held-out images. Exits with 1 if a required figure is missed, with 2 after
an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_pipeline.errors import DataError
from demo.errors import DemoError
from tools.errors import errors_in_one_line

OUT = Path("demo_out")
PROCESSES = 2
BATCH = "train.global_batch_size=2"  # packs per step: one per process


@dataclass(frozen=True)
class Variant:
    """A model of the demo and how it is trained."""

    name: str  # published name
    preset: str  # of configs/model
    layout: tuple[str, ...]  # overrides: the layout over PROCESSES
    steps: tuple[int, int, int]  # per stage


VARIANTS = {
    "moe": Variant("GLM-4.5V", "tiny_moe", ("parallel.expert_model_parallel_size=2",), steps=(420, 50, 260)),
    "dense": Variant("GLM-4.1V", "tiny_dense", (), steps=(420, 60, 260)),
}


@dataclass(frozen=True)
class Stage:
    """A training stage."""

    name: str  # of the configuration in configs/tiny
    entry: str  # module

    @property
    def config(self) -> str:
        return f"configs/tiny/{self.name}.yaml"


STAGES = (
    Stage("pretrain", "pretrain.train"),
    Stage("long_context", "pretrain.train"),
    Stage("sft", "sft.train"),
)

HELD_OUT = [OUT / "shards" / f"held_out_{name}" for name in ("captions", "ocr", "video", "describe", "think")]
DESCRIPTIONS = OUT / "shards" / "held_out_describe"
QUESTIONS = OUT / "shards" / "held_out_name"

NEXT = """On a cluster
  shard your own data      python -m tools.shard build --input records.jsonl --out shards --tokenizer TOKENIZER_DIR
  import published weights python -m tools.convert import --hf GLM_DIR --out CHECKPOINT
  train, on every node     torchrun --nnodes N --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                             -m pretrain.train --config YOUR.yaml model.init_from=CHECKPOINT
  export to Hugging Face   python -m tools.convert export --checkpoint RUN_DIR --out HF_DIR
  ask this model           python -m tools.generate --hf {exported} --image {image} \\
                             --prompt "What is in this image?" --no-thinking
docs/training.md lists every key; configs/tiny/*.yaml are the files to start from."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def main(
    variant: Annotated[str, typer.Option(help="moe: GLM-4.5V; dense: GLM-4.1V")] = "moe",
) -> None:
    """Train a tiny GLM-V from real images to a Hugging Face folder."""
    with errors_in_one_line(DemoError, DataError):
        if variant not in VARIANTS:
            raise DemoError(f"--variant {variant}: choose one of {', '.join(VARIANTS)}")
        passed = run(variant, VARIANTS[variant])
    raise typer.Exit(0 if passed else 1)


def run(key: str, variant: Variant) -> bool:
    """Run everything for one variant and print the report; return whether every required figure was met."""
    from demo.build import build_once
    from demo.report import draw_answers, draw_losses, held_out_rows, stage_figures, stage_row, table

    started = time.monotonic()
    runs, exported = OUT / "runs" / key, OUT / "export" / key
    shutil.rmtree(runs, ignore_errors=True)
    shutil.rmtree(exported, ignore_errors=True)

    with console.status("building shards from real images, videos and texts"):
        build_once(OUT)
    layout = ", ".join(variant.layout) or f"data parallel {PROCESSES}"
    console.print(f"Training a tiny {variant.name} on {PROCESSES} processes ({layout})")
    start = f"model.preset={variant.preset}"
    for stage, steps in zip(STAGES, variant.steps, strict=True):
        train(stage, steps, runs / stage.name, [start, BATCH, *variant.layout])
        start = f"model.init_from={runs / stage.name}"
    tuned = runs / STAGES[-1].name
    with console.status("exporting"):
        call("tools.convert", "export", "--checkpoint", tuned, "--out", exported)
    with console.status("asking the exported model"):
        production = result_of("production", tuned, *HELD_OUT)
        options = ("--descriptions", DESCRIPTIONS, "--questions", QUESTIONS, "--records", OUT / "records")
        asked = result_of("exported", exported, *HELD_OUT, *options)

    metrics = {stage.name: runs / stage.name / "metrics.jsonl" for stage in STAGES}
    rows = [stage_row(name, stage_figures(path)) for name, path in metrics.items()]
    rows += held_out_rows(production, asked)
    console.print(table(variant.name, rows))
    print_answers(asked["shown"])
    console.print(f"\nloss curves     {draw_losses(metrics, runs / 'loss.png')}")
    console.print(f"answers         {draw_answers(asked['shown'], runs / 'answers.png')}")
    console.print(f"exported model  {exported}")
    console.print(f"took            {time.monotonic() - started:.0f} s\n")
    console.print(NEXT.format(exported=exported, image=asked["shown"][0]["image"]), markup=False, soft_wrap=True)
    return all(row.met for row in rows)


def print_answers(shown: list[dict[str, str]]) -> None:
    image = ""
    for entry in shown:
        if entry["image"] != image:
            image = entry["image"]
            console.print(f"\n{image}", markup=False)
        console.print(f"  {entry['question']:24} {' '.join(entry['answer'].split())}", markup=False, soft_wrap=True)


def train(stage: Stage, steps: int, folder: Path, overrides: list[str], *, shown: str = "loss") -> None:
    """Run a stage under torchrun, with a progress bar read from its metrics.

    Args:
        stage: what runs.
        steps: its length.
        folder: the run's, to be made.
        overrides: keys of the run.
        shown: the metric beside the bar.

    Raises:
        DemoError: the stage failed; the message has the error lines of its output, or its last lines.
    """
    folder.mkdir(parents=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    keys = [f"train.output_dir={folder}", f"train.steps={steps}"]
    command = [*torchrun, "-m", stage.entry, "--config", stage.config, *keys, *overrides]
    output, metrics = folder / "output.txt", folder / "metrics.jsonl"
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
    )
    with open(output, "w") as log, Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        task = progress.add_task(stage.name, total=steps, value="")
        while process.poll() is None:
            time.sleep(0.5)
            if lines := whole_lines(metrics):
                progress.update(task, completed=len(lines), value=f"{shown} {json.loads(lines[-1])[shown]:.3f}")
        progress.update(task, completed=steps if process.returncode == 0 else None)
    if process.returncode != 0:
        raise DemoError(f"the stage {stage.name} failed, see {output}:\n" + "\n".join(error_lines(output.read_text())))


def error_lines(output: str) -> list[str]:
    """Return the errors that the processes of a run have reported, or else the last lines of its output."""
    errors = re.findall(r"^error(?: on rank \d+)?: (.*)", output, re.MULTILINE)
    return list(dict.fromkeys(errors)) or output.splitlines()[-25:]


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that is being written, without an unfinished last one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def result_of(command: str, *arguments: str | Path) -> dict[str, Any]:
    """Return what a command of demo.evaluate prints last, as JSON."""
    return json.loads(call("demo.evaluate", command, *arguments).splitlines()[-1])


def call(module: str, *arguments: str | Path) -> str:
    """Run a command line of the project and return its standard output. Raises DemoError with its error output."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        raise DemoError(f"`{' '.join(command[1:])}` failed:\n{done.stderr[-3000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """One thread per process, since two processes share two cores; no GPU, which they could not share."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}


if __name__ == "__main__":
    typer.run(main)
