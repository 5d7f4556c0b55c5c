"""Compare runs on one page: curves, mixture, expert load, speed, and the difference of their configurations.

    python -m tools.report RUN [RUN...] [--out report.html] [--x step|tokens]

RUN is a run folder. The run may still be training, and runs may be of different lengths. The page is one file without
scripts or external links.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.files import write_text
from model.config import ConfigError
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


class XAxis(StrEnum):
    """What the curves are drawn over."""

    step = "step"
    tokens = "tokens"


@app.command(help=keep_lines(__doc__))
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    x: Annotated[XAxis, typer.Option(help="what the curves are drawn over")] = XAxis.step,
) -> None:
    from tools.report_charts import RUN_COLORS
    from tools.report_page import page
    from tools.report_runs import read_runs

    with errors_in_one_line(ConfigError):
        if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
            raise ConfigError(f"--out {out} is no page, and would be replaced: give a file whose name ends with .html")
        records = read_runs(runs)
        for number, record in enumerate(records):
            record.color, record.x_axis = RUN_COLORS[number % len(RUN_COLORS)], x.value
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page(records, "step" if x is XAxis.step else "useful tokens"))
    console.print(f"wrote {out}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(app)
