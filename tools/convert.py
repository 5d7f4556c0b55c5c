"""Convert between Hugging Face folders and checkpoints that load at any layout.

    python -m tools.convert import --hf DIR_OR_URL --out CKPT
    python -m tools.convert export --checkpoint CKPT --out DIR [--dtype bf16|fp32|keep] [--fp8]
                                    [--max-shard-size 5GB] [--verify full|sizes]
    python -m tools.convert export --follow RUN --out DIR [--poll-seconds 10] [options of export]
    python -m tools.convert assemble --vision DIR --decoder DIR --out DIR [--rope-theta N] [--max-positions N]
                                    [--tokenizer DIR] [--seed N] [--dtype bf16|fp32|keep]
    python -m tools.convert export-lora --checkpoint CKPT --out DIR [--verify full|sizes]
    python -m tools.convert merge --checkpoint CKPT --out DIR [--base DIR_OR_URL] [--dtype bf16|fp32|keep]
                                    [--max-shard-size 5GB] [--verify full|sizes]
    python -m tools.convert inspect PATH [--tensors] [--json]
    python -m tools.convert verify DIR_A DIR_B [--logits [--tolerance T]]

Every command that writes a folder uses no more memory than --max-memory. CKPT is a step folder, or a run's folder for
its newest step. An export contains the tokenizer, chat template and processor files that the import found. Import and
export change no bit of float32 or bfloat16 weights. export --fp8 writes the decoder's linear layers as FP8 with a
scale for each block of 128x128, as vLLM and SGLang read it. export-lora and merge take a checkpoint of a LoRA run: the
first writes its adapters for PEFT, the second a whole model. assemble makes the initial model of pretraining:
AIMv2-Huge as the vision tower, GLM-4.5-Air or GLM-4-9B-0414 as the decoder, and a new adapter.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.errors import errors_in_one_line, on_a_disk, run
from tools.help_text import keep_lines

# Commands import what needs torch themselves, after __main__ has hidden the GPUs from it.

app = typer.Typer(help=keep_lines(__doc__), no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()

POLL_SECONDS = 10.0

MaxMemory = Annotated[str, typer.Option(help="most memory of all processes, such as 4GiB", show_default="none")]
Processes = Annotated[int, typer.Option(help="processes that convert; 0: one per core, as the memory allows")]
Checksum = Annotated[str, typer.Option(help="of each tensor, kept with the weights: xxh3 or sha256")]


# --- import -----------------------------------------------------------------------------------------------------------


@app.command("import")
def import_command(
    hf: Annotated[str, typer.Option(help="Hugging Face folder of a GLM-V model, with safetensors weights, or its URL")],
    out: Annotated[Path, typer.Option(help="checkpoint to make: a folder that does not exist or is empty")],
    max_memory: MaxMemory = "",
    processes: Processes = 0,
    checksum: Checksum = "xxh3",
) -> None:
    """Make a checkpoint of a Hugging Face folder."""
    from model.weights.remote import hf_folder, title
    from tools.conversion import CONVERSION_ERRORS, ConversionOptions, import_folder

    with errors_in_one_line(*CONVERSION_ERRORS):
        folder = hf_folder(hf)
        for line in import_folder(folder, out, ConversionOptions(max_memory, processes, checksum)):
            console.print(f"read as: {line}", markup=False, soft_wrap=True)
    console.print(f"imported {title(folder)} into {out}", markup=False, soft_wrap=True)


# --- export -----------------------------------------------------------------------------------------------------------


@app.command("export")
def export_command(
    out: Annotated[Path, typer.Option(help="Hugging Face folder to make: a folder that does not exist or is empty")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="step folder, or a run's folder for its newest step  [default: none]")
    ] = None,
    follow: Annotated[
        Path | None,
        typer.Option(help="run folder: export each checkpoint as it is saved, as OUT/step_NNNNNNN  [default: none]"),
    ] = None,
    poll_seconds: Annotated[
        float | None, typer.Option(help="with --follow, how often to look for new checkpoints  [default: 10]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp32, or keep: the checkpoint's own dtype")] = "keep",
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="linear layers of the decoder in FP8 with block scales; --dtype is that of the other weights"
            "  [default: off]",
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="largest file of weights, such as 5GB or 500MiB")] = "5GB",
    verify: Annotated[
        str, typer.Option(help="compare the checkpoint with its manifest: full (sizes and checksums) or sizes")
    ] = "full",
    max_memory: MaxMemory = "",
    processes: Processes = 0,
    checksum: Checksum = "xxh3",
) -> None:
    """Make a Hugging Face folder of a checkpoint, or of each checkpoint of a run."""
    from tools.conversion import CONVERSION_ERRORS, ConversionOptions, export_checkpoint, fp8_line
    from tools.hf_output import ConvertError, check_options, shard_bytes

    with errors_in_one_line(*CONVERSION_ERRORS):
        if (checkpoint is None) == (follow is None):
            given = "both are given" if follow else "neither is given"
            raise ConvertError(f"use either --checkpoint or --follow: {given}")
        if poll_seconds is not None and follow is None:
            raise ConvertError("--poll-seconds is for --follow: remove it, or give --follow")
        check_options(dtype, verify)
        options: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": shard_bytes(max_shard_size), "verify": verify}
        if fp8:  # absent otherwise: an OUT of --follow from before this option existed stays valid
            options["fp8"] = True
        how = ConversionOptions(max_memory, processes, checksum)
        if follow is not None:
            _follow(follow, out, options, how, poll_seconds if poll_seconds is not None else POLL_SECONDS)
            return
        assert checkpoint is not None
        export_checkpoint(checkpoint, out, **options, options=how)
        if fp8:
            console.print(fp8_line(out), markup=False, soft_wrap=True)
    console.print(f"exported {checkpoint} into {out}", markup=False, soft_wrap=True)


def _follow(run: Path, out: Path, options: dict[str, Any], how: Any, poll_seconds: float) -> None:
    from tools.conversion import export_checkpoint
    from tools.follow import FollowError, Stopped, follow
    from training.run_state import EXIT_STOPPED

    try:
        with errors_in_one_line(FollowError):
            complete = follow(
                run,
                out,
                export=partial(export_checkpoint, **options, options=how),
                options=options,
                poll_seconds=poll_seconds,
                say=lambda line: console.print(line, markup=False, soft_wrap=True),
            )
    except Stopped as stopped:
        console.print(str(stopped), markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_STOPPED) from None
    if not complete:
        raise typer.Exit(1)


# --- assemble ---------------------------------------------------------------------------------------------------------


@app.command("assemble")
def assemble_command(
    vision: Annotated[
        Path, typer.Option(help="folder of AIMv2-Huge (apple/aimv2-huge-patch14-336)", callback=on_a_disk)
    ],
    decoder: Annotated[Path, typer.Option(help="folder of GLM-4.5-Air or GLM-4-9B-0414", callback=on_a_disk)],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to make: a folder that does not exist or is empty")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="folder of a tokenizer with the tokens of images and videos, if not the decoder's", show_default="none"
        ),
    ] = "",
    rope_theta: Annotated[int, typer.Option(help="rope base; 0 keeps the decoder's")] = 0,
    max_positions: Annotated[int, typer.Option(help="longest sequence in tokens; 0 keeps the decoder's")] = 0,
    seed: Annotated[int, typer.Option(help="of the tensors that are new: the adapter")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16, fp32, or keep: the decoder's own dtype")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="largest file of weights, such as 5GB or 500MiB")] = "5GB",
    max_memory: MaxMemory = "",
    processes: Processes = 0,
    checksum: Checksum = "xxh3",
) -> None:
    """Make the initial model of pretraining."""
    from tools.assembly import plan_assembly, write_assembly
    from tools.conversion import CONVERSION_ERRORS, ConversionOptions
    from tools.hf_output import DTYPES, check_options, refuse_full, shard_bytes

    with errors_in_one_line(*CONVERSION_ERRORS):
        check_options(dtype, "full")
        refuse_full(out)
        max_shard_bytes = shard_bytes(max_shard_size)
        assembly = plan_assembly(
            vision,
            decoder,
            tokenizer=Path(tokenizer) if tokenizer else None,
            rope_theta=rope_theta,
            max_positions=max_positions,
            seed=seed,
            dtype=DTYPES.get(dtype),
        )
        table = Table(box=None)
        for title in ("part", "tensors", "values", "from"):
            table.add_column(title, justify="right" if title in ("tensors", "values") else "left", overflow="fold")
        for row in assembly.table():
            table.add_row(*map(escape, row))
        console.print(table)
        for line in assembly.lines():
            console.print(line, markup=False, soft_wrap=True)
        write_assembly(assembly, out, max_shard_bytes, ConversionOptions(max_memory, processes, checksum))
    console.print(f"assembled {out}; model.init_from={out} starts from it", markup=False, soft_wrap=True)


# --- adapters ---------------------------------------------------------------------------------------------------------


@app.command("export-lora")
def export_lora_command(
    checkpoint: Annotated[Path, typer.Option(help="step folder of a LoRA run, or its run folder for the newest step")],
    out: Annotated[Path, typer.Option(help="PEFT folder to make: a folder that does not exist or is empty")],
    verify: Annotated[
        str, typer.Option(help="compare the checkpoint with its manifest: full (sizes and checksums) or sizes")
    ] = "full",
    max_memory: MaxMemory = "",
    processes: Processes = 0,
    checksum: Checksum = "xxh3",
) -> None:
    """Make a folder that PEFT loads of the adapters in a checkpoint."""
    from tools.conversion import CONVERSION_ERRORS, ConversionOptions
    from tools.lora_output import export_lora

    with errors_in_one_line(*CONVERSION_ERRORS):
        export_lora(checkpoint, out, verify=verify, options=ConversionOptions(max_memory, processes, checksum))
    console.print(f"exported the adapters of {checkpoint} into {out}", markup=False, soft_wrap=True)


@app.command("merge")
def merge_command(
    checkpoint: Annotated[Path, typer.Option(help="step folder of a LoRA run, or its run folder for the newest step")],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to make: a folder that does not exist or is empty")],
    base: Annotated[
        str,
        typer.Option(help="the base model, or its URL, if it is no longer where model.init_from of the run says"),
    ] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp32, or keep: the base model's own dtype")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="largest file of weights, such as 5GB or 500MiB")] = "5GB",
    verify: Annotated[
        str,
        typer.Option(help="compare adapters and base model with their checksums: full (sizes and checksums) or sizes"),
    ] = "full",
    max_memory: MaxMemory = "",
    processes: Processes = 0,
    checksum: Checksum = "xxh3",
) -> None:
    """Make a Hugging Face folder of the base model with the adapters in a checkpoint added to its weights."""
    from tools.conversion import CONVERSION_ERRORS, ConversionOptions
    from tools.hf_output import shard_bytes
    from tools.lora_output import merge

    with errors_in_one_line(*CONVERSION_ERRORS):
        merge(
            checkpoint,
            out,
            base=base,
            dtype=dtype,
            max_shard_bytes=shard_bytes(max_shard_size),
            verify=verify,
            options=ConversionOptions(max_memory, processes, checksum),
        )
    console.print(f"merged {checkpoint} into {out}", markup=False, soft_wrap=True)


# --- inspect ----------------------------------------------------------------------------------------------------------


@app.command("inspect")
def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(help="step folder, run folder (its newest step) or Hugging Face folder", callback=on_a_disk),
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="list every tensor, with its files and checksum  [default: off]")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for programs  [default: off]")] = False,
) -> None:
    """Show what is in a checkpoint or a Hugging Face folder; exit with 1 if files do not fit together."""
    from model.errors import CheckpointError
    from tools import inspection_page
    from tools.inspection import InspectError, inspect_folder

    with errors_in_one_line(InspectError, CheckpointError):
        found = inspect_folder(path)
    if as_json:
        print(json.dumps(inspection_page.as_json(found, list_tensors=tensors), indent=2, ensure_ascii=False))
    else:
        inspection_page.show(found, console, list_tensors=tensors)
    if found.problems:
        raise typer.Exit(1)


# --- verify -----------------------------------------------------------------------------------------------------------


@app.command("verify")
def verify_command(
    dir_a: Annotated[
        Path,
        typer.Argument(help="Hugging Face folder, step folder, or run folder for its newest step", callback=on_a_disk),
    ],
    dir_b: Annotated[
        Path,
        typer.Argument(help="Hugging Face folder, step folder, or run folder for its newest step", callback=on_a_disk),
    ],
    logits: Annotated[
        bool,
        typer.Option("--logits", help="run both models with transformers and compare their logits  [default: off]"),
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="largest difference of a logit, with --logits  [default: 0]")
    ] = None,
) -> None:
    """Compare the weights of two Hugging Face folders or checkpoints; exit with 1 if they differ."""
    from tools.conversion import CONVERSION_ERRORS
    from tools.hf_output import ConvertError

    with errors_in_one_line(*CONVERSION_ERRORS):
        if tolerance is not None and not logits:
            raise ConvertError(
                "--tolerance is for --logits: tensors are compared bit by bit; remove it, or add --logits"
            )
        if tolerance is not None and not tolerance >= 0:
            raise ConvertError(f"--tolerance {tolerance:g}: give 0 or more")
        if logits:
            equal = _verify_logits(dir_a, dir_b, tolerance or 0)
        else:
            from tools.verification import verify_tensors

            equal = verify_tensors(dir_a, dir_b, console)
    if not equal:
        raise typer.Exit(1)


def _verify_logits(dir_a: Path, dir_b: Path, tolerance: float) -> bool:
    from data_pipeline.errors import DataError
    from tools.exported import GenerateError
    from tools.probe import ProbeError
    from tools.verification import verify_logits

    with errors_in_one_line(DataError, GenerateError, ProbeError):
        return verify_logits(dir_a, dir_b, tolerance, console)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model need not fit a GPU; set before torch looks for one
    run(app)
