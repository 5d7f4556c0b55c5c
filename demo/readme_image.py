"""Draw the image of the README: the demo's loss curves beside a page of tools.view.

python -m demo.readme_image --out docs/images/overview.png      after `make demo`; needs Chromium
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.inputs.grounding.browser import find_chromium
from demo.__main__ import OUT, STAGES, VARIANTS
from demo.errors import DemoError
from tools.errors import errors_in_one_line

SHARDS = ("grounding", "chat_think")
PAGE_SIZE = (900, 1180)  # pixels
COLUMN_WIDTH = 500  # of the loss curves


def main(
    out: Annotated[Path, typer.Option(help="the PNG file to write")] = Path("docs/images/overview.png"),
    variant: Annotated[str, typer.Option(help="moe or dense, as it was trained by the demo")] = "moe",
) -> None:
    """Draw the image of the README."""
    with errors_in_one_line(DemoError, DataError):
        draw(out, variant)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


def draw(out: Path, variant: str) -> None:
    """Draw the image of the README into `out`. Raises DemoError, or DataError if there is no Chromium."""
    from demo.report import draw_losses

    if variant not in VARIANTS:
        raise DemoError(f"--variant {variant}: choose one of {', '.join(VARIANTS)}")
    metrics = {stage.name: OUT / "runs" / variant / stage.name / "metrics.jsonl" for stage in STAGES}
    if missing := [path for path in metrics.values() if not path.is_file()]:
        raise DemoError(f"{missing[0]} does not exist: run `make demo VARIANT={variant}` first")
    with tempfile.TemporaryDirectory() as folder:
        panels = []
        for stage, path in metrics.items():
            panels.append(Image.open(draw_losses({stage: path}, Path(folder) / f"{stage}.png")).convert("RGB"))
        page = screenshot(Path(folder))
    column = stacked(panels, PAGE_SIZE[1])
    image = Image.new("RGB", (column.width + page.width, PAGE_SIZE[1]), "white")
    image.paste(column, (0, 0))
    image.paste(page, (column.width, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


def screenshot(folder: Path) -> Image.Image:
    """Return the page of one sample per source, as Chromium shows it."""
    page, image = folder / "page.html", folder / "page.png"
    shards = [str(OUT / "shards" / name) for name in SHARDS]
    command = [sys.executable, "-m", "tools.view", "shards", *shards, "--samples", str(len(SHARDS))]
    subprocess.run(
        [*command, "--tokenizer", str(OUT / "tokenizer"), "--out", str(page)], check=True, stdout=subprocess.DEVNULL
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
    size = f"--window-size={PAGE_SIZE[0]},{PAGE_SIZE[1]}"
    subprocess.run(
        [find_chromium(), *options, size, f"--screenshot={image}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return Image.open(image).convert("RGB")


def stacked(panels: list[Image.Image], height: int) -> Image.Image:
    """Return the panels below one another, in a column of the given height."""
    column = Image.new("RGB", (COLUMN_WIDTH, height), "white")
    each = height // len(panels)
    for number, panel in enumerate(panels):
        panel.thumbnail((COLUMN_WIDTH, each), Image.Resampling.LANCZOS)
        column.paste(panel, (0, number * each + (each - panel.height) // 2))
    return column


if __name__ == "__main__":
    typer.run(main)
