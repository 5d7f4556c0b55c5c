"""The whole road in a few minutes on two CPU cores: `python -m demo [--variant dense]`, or `make demo`.

Real pictures, clips and texts are sharded; a tiny GLM-4.5V (or GLM-4.1V) is pretrained on two processes, continued at a
longer context with video, fine-tuned on chats and exported; transformers loads the export, must compute our loss, must
lose its way when the pictures are swapped, and describes one. Exits with 1 if a required figure is missed.
"""

from __future__ import annotations

import json
import os
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
from rich.table import Table

from demo.data import build_once
from demo.media import DemoError
from demo.report import Figures, draw_losses, stage_figures

OUT = Path("demo_out")
PROCESSES = 2


@dataclass(frozen=True)
class Variant:
    """A model of the demo, how it is laid out over two processes, and how many steps each stage of it takes."""

    name: str
    preset: str
    layout: tuple[str, ...]
    steps: tuple[int, int, int]


VARIANTS = {
    "moe": Variant("GLM-4.5V", "tiny_moe", ("parallel.expert_model_parallel_size=2",), steps=(160, 50, 100)),
    "dense": Variant("GLM-4.1V", "tiny_dense", (), steps=(220, 60, 100)),
}


@dataclass(frozen=True)
class Stage:
    """A stage of the road: its entry, and its configuration in configs/tiny."""

    name: str
    entry: str
    global_batch_size: int

    @property
    def config(self) -> str:
        return f"configs/tiny/{self.name}.yaml"


STAGES = (
    Stage("pretrain", "pretrain.train", global_batch_size=4),
    Stage("long_context", "pretrain.train", global_batch_size=2),
    Stage("sft", "sft.train", global_batch_size=2),
)

LOSS_FALL = 0.30  # every stage's loss falls by at least this share
EYES = 1.5  # the caption loss with swapped pictures over that with the right ones
PARITY = 1e-4  # relative difference between our loss and transformers'
HELD_OUT = [f"demo_out/shards/held_out_{name}" for name in ("captions", "ocr", "video", "chat", "think")]
CAPTIONS = "demo_out/shards/held_out_chat"  # "Describe this picture." and its caption
PICTURE = "demo_out/records/media/held_out/coffee-00.jpg"
QUESTIONS = (("Describe this picture.", "--no-thinking"), ("What is in this picture?", "--thinking"))

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def main(
    variant: Annotated[str, typer.Option(help="moe: GLM-4.5V; dense: GLM-4.1V")] = "moe",
) -> None:
    """Train a tiny GLM-V from real pictures to a Hugging Face folder."""
    if variant not in VARIANTS:
        console.print(f"error: there is no variant {variant!r}: choose one of {', '.join(VARIANTS)}", style="red")
        raise typer.Exit(2)
    try:
        passed = run(variant, VARIANTS[variant])
    except DemoError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if passed else 1)


def run(key: str, variant: Variant) -> bool:
    """The whole road for one variant; returns whether every required figure was met."""
    started = time.monotonic()
    runs, exported = OUT / "runs" / key, OUT / "export" / key
    shutil.rmtree(runs, ignore_errors=True)
    shutil.rmtree(exported, ignore_errors=True)

    with console.status("building shards from real pictures, clips and texts"):
        build_once(OUT)
    layout = ", ".join(variant.layout) or f"data parallel {PROCESSES}"
    console.print(f"Training a tiny {variant.name} on {PROCESSES} processes ({layout})")
    previous = None
    for stage, steps in zip(STAGES, variant.steps, strict=True):
        origin = f"model.init_from={previous}" if previous else f"model.preset={variant.preset}"
        train(stage, steps, runs / stage.name, [origin, *variant.layout])
        previous = runs / stage.name
    with console.status("exporting"):
        call("tools.convert", "export", "--checkpoint", str(previous), "--out", str(exported))
    with console.status("asking transformers"):
        ours = json.loads(call("demo.evaluate", "ours", str(previous), *HELD_OUT).splitlines()[-1])
        asked = call("demo.evaluate", "exported", str(exported), *HELD_OUT, "--captions", CAPTIONS)
        theirs = json.loads(asked.splitlines()[-1])
        said = {
            question: call(
                "tools.generate", "--hf", str(exported), "--image", PICTURE, "--prompt", question, mode
            ).strip()
            for question, mode in QUESTIONS
        }

    figures = {stage.name: stage_figures(runs / stage.name / "metrics.jsonl") for stage in STAGES}
    curve = draw_losses({stage.name: runs / stage.name / "metrics.jsonl" for stage in STAGES}, runs / "loss.png")
    rows = [*map(stage_row, figures.items()), parity_row(ours, theirs), eyes_row(theirs)]
    console.print(table(variant.name, rows))
    console.print(f"\n{PICTURE}")
    for question, answer in said.items():
        console.print(f"  {question}  {' '.join(answer.split())}", markup=False, soft_wrap=True)
    console.print(f"\nloss curves     {curve}\nexported model  {exported}")
    console.print(f"took            {time.monotonic() - started:.0f} s\n")
    console.print(NEXT.format(exported=exported, picture=PICTURE), markup=False, soft_wrap=True)
    return all(row.met for row in rows)


NEXT = """On a real cluster
  shard your own data     python -m tools.shard build --input records.jsonl --out shards --tokenizer TOKENIZER_DIR
  start from the hub's    python -m tools.convert import --hf GLM_DIR --out CHECKPOINT
  train, on every node    torchrun --nnodes N --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                            -m pretrain.train --config YOUR.yaml model.init_from=CHECKPOINT
  give it back            python -m tools.convert export --checkpoint RUN_DIR --out HF_DIR
  try this one            python -m tools.generate --hf {exported} --image {picture} \\
                            --prompt "Describe this picture." --no-thinking
docs/training.md lists every key; configs/tiny/*.yaml are the files to start from."""


def train(stage: Stage, steps: int, folder: Path, overrides: list[str]) -> None:
    """Run a stage under torchrun, with a progress bar read from its metrics. Raises DemoError with the log's end."""
    folder.mkdir(parents=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)),
        *("-m", stage.entry, "--config", stage.config, f"train.output_dir={folder}"),
        *(f"train.steps={steps}", f"train.global_batch_size={stage.global_batch_size}", *overrides),
    ]
    output, metrics = folder / "output.txt", folder / "metrics.jsonl"
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with open(output, "w") as log, Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        task = progress.add_task(stage.name, total=steps, loss="")
        while process.poll() is None:
            time.sleep(0.5)
            if (
                metrics.exists()
                and (lines := metrics.read_text().splitlines(keepends=True))
                and lines[-1].endswith("\n")
            ):
                progress.update(task, completed=len(lines), loss=f"{json.loads(lines[-1])['loss']:.3f}")
        progress.update(task, completed=steps if process.returncode == 0 else None)
    if process.returncode != 0:
        lines = output.read_text().splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-25:]
        raise DemoError(f"the stage {stage.name} failed, see {output}:\n" + "\n".join(said))


def call(module: str, *arguments: str) -> str:
    """Run one of our command lines; returns what it printed. Raises DemoError with its error output."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        raise DemoError(f"`python -m {module} {' '.join(arguments)}` failed:\n{done.stderr[-3000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """One thread a process: two processes share two cores, and would not share a GPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRANSFORMERS_VERBOSITY": "error",
    }


# The table: every figure that was measured, and what is required of it


@dataclass(frozen=True)
class Row:
    what: str
    measured: str
    required: str
    met: bool
    steps: str = ""
    tokens_per_second: str = ""


def stage_row(stage: tuple[str, Figures]) -> Row:
    name, figures = stage
    return Row(
        what=name,
        measured=f"{figures.first:.3f} -> {figures.last:.3f} ({-figures.fall:.0%})",
        required=f"falls by {LOSS_FALL:.0%}",
        met=figures.fall >= LOSS_FALL,
        steps=str(figures.steps),
        tokens_per_second=f"{figures.tokens_per_second:,.0f}",
    )


def parity_row(ours: dict[str, Any], theirs: dict[str, Any]) -> Row:
    difference = abs(ours["loss"] - theirs["loss"]) / theirs["loss"]
    return Row(
        what="held out: ours, transformers",
        measured=f"{ours['loss']:.6f}, {theirs['loss']:.6f} ({difference:.0e})",
        required=f"within {PARITY:.0e}",
        met=difference <= PARITY,
    )


def eyes_row(theirs: dict[str, Any]) -> Row:
    ratio = theirs["swapped"] / theirs["captions"]
    return Row(
        what="captions: own, another's picture",
        measured=f"{theirs['captions']:.3f}, {theirs['swapped']:.3f} (x{ratio:.1f})",
        required=f"rises to x{EYES}",
        met=ratio >= EYES,
    )


def table(name: str, rows: list[Row]) -> Table:
    made = Table("", "steps", "loss, first -> last", "tokens/s", "required", "", title=f"tiny {name}")
    for row in rows:
        verdict = "[green]met[/green]" if row.met else "[red]MISSED[/red]"
        made.add_row(row.what, row.steps, row.measured, row.tokens_per_second, row.required, verdict)
    return made


if __name__ == "__main__":
    typer.run(main)
