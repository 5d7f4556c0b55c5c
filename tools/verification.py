"""Show how two models differ: their tensors and files, or their logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.checkpoint import is_checkpoint
from tools.comparison import TensorDifference, compare_files, compare_tensors, open_sides
from tools.hf_output import ConvertError

SHOWN = 40


def verify_tensors(dir_a: Path, dir_b: Path, console: Console) -> bool:
    """Compare tensors and files, print what differs, and return whether nothing does.

    Raises:
        ConvertError: A file is not JSON.
        CheckpointError, WeightsError: A checkpoint or folder has no readable weights.
    """
    a, b = open_sides(dir_a, dir_b)
    tensors, files = compare_tensors(a, b), list(compare_files(a.files, b.files))
    if not tensors and not files:
        console.print(f"equal: {len(a.names):,} tensors bit for bit, and all other files")
        return True
    if tensors:
        console.print(_tensor_table(tensors))
    if files:
        table = _table("what differs", str(dir_a), str(dir_b))
        for row in files[:SHOWN]:
            table.add_row(*map(escape, row))
        console.print(table)
    shown = min(len(tensors), SHOWN) + min(len(files), SHOWN)
    console.print(
        f"differences: {len(tensors) + len(files):,} ({shown} shown): {len(tensors):,} of {len(a.names):,} tensors, "
        f"{len(files):,} in other files",
        soft_wrap=True,
    )
    return False


def _tensor_table(differences: Sequence[TensorDifference]) -> Table:
    table = _table("tensor", "largest difference", "how it differs")
    for each in differences[:SHOWN]:
        largest = "" if each.largest is None else f"{each.largest:.3g}"
        table.add_row(escape(each.name), largest, escape(each.what))
    return table


def verify_logits(dir_a: Path, dir_b: Path, tolerance: float, console: Console) -> bool:
    """Run both models on the same prompts, print how their logits differ, and return whether that is tolerable.

    Raises:
        GenerateError, DataError, ProbeError, WeightsError: A model cannot be run (tools.probe).
        ConvertError: A folder is a checkpoint.
    """
    for folder in (dir_a, dir_b):
        if is_checkpoint(folder):
            raise ConvertError(f"{folder} is a checkpoint: export it first; --logits runs Hugging Face folders")
    from tools.probe import compare_logits  # transformers takes seconds to import

    differences = compare_logits(dir_a, dir_b, console)
    table = _table("prompt", "tokens", "largest difference of a logit", "largest KL divergence", "same top token")
    for each in differences:
        table.add_row(
            each.prompt, str(each.tokens), f"{each.largest:.3g}", f"{each.divergence:.3g}", f"{each.agreement:.2%}"
        )
    console.print(table)
    largest = max(each.largest for each in differences)
    within = largest <= tolerance  # not so if it is not a number
    verdict = "within" if within else "above"
    console.print(f"the largest difference of a logit is {largest:.3g}, {verdict} --tolerance {tolerance:g}")
    return within


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(escape(title), overflow="fold")
    return table
