"""Build the demo's tokenizer and shards: `python -m demo.data --out demo_out`, or `make demo-data`.

    demo_out/tokenizer/          a byte-level BPE with GLM's special tokens
    demo_out/records/NAME.jsonl  the records of each source, to read (images and videos in records/media/)
    demo_out/shards/NAME/        the same, sharded and indexed: what configs/tiny/*.yaml train on

The same command writes the same shards every time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_pipeline.errors import DataError
from demo.errors import DemoError
from tools.errors import errors_in_one_line


def main(out: Annotated[Path, typer.Option(help="folder to write")] = Path("demo_out")) -> None:
    """Build the demo's tokenizer and shards."""
    from demo.build import build
    from demo.media import scenes, subjects

    console = Console()
    started = time.monotonic()
    with errors_in_one_line(DemoError, DataError):
        samples = build(out)
    console.print(
        f"{sum(samples.values()):,} samples in {len(samples)} sources under {out}/shards: {len(subjects())} subjects, "
        f"{len(scenes())} videos, rendered pages and the documentation of scikit-image "
        f"({time.monotonic() - started:.0f} s)"
    )


if __name__ == "__main__":
    typer.run(main)
