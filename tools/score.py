"""Score an exported model on held-out shards: transcriptions, boxes, boxed results and other answers.

    python -m tools.score --hf DIR --shards SHARDS [--shards MORE ...] [--out scores.json] [--rows]

transformers runs the model, which writes the most likely token each time. Samples of the domains ocr, grounding and
chat are scored; others are counted. A sample from which nothing can be asked is counted too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.files import write_json
from data_pipeline.errors import DataError
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=keep_lines(__doc__))
def main(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder, for example from tools.convert export")],
    shards: Annotated[list[str], typer.Option(help="folder of shards, .tar file or pattern; may be repeated")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write the scores to")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="write every question and answer into --out too")] = False,
    limit: Annotated[int, typer.Option(min=0, help="samples, at equal distances through all shards; 0: all")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="questions that are answered at once")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 1024,
) -> None:
    from data_pipeline.shards.index import read_index
    from tools.exported import Exported, GenerateError
    from tools.score_answers import score, table_of
    from tools.shard_paths import shards_of

    with errors_in_one_line(DataError, GenerateError):
        if rows and out is None:
            raise GenerateError("--rows writes into the file of --out: add --out scores.json")
        if out is not None and not out.parent.is_dir():
            raise GenerateError(f"--out {out}: there is no folder {out.parent}")
        paths = shards_of(shards, lambda empty: console.print(empty, markup=False, soft_wrap=True))
        indexes = [read_index(path) for path in paths]
        exported = Exported.load(hf)
        result = score(exported, indexes, limit=limit, batch=batch, max_new_tokens=max_new_tokens)
        console.print(table_of(result))
        for reason, count in result.unscored.items():
            console.print(f"not scored: {count:,} samples: {reason}", markup=False, highlight=False)
        if out is not None:
            content = {"hf": str(hf), "scores": result.summary(), "unscored": dict(result.unscored)}
            write_json(out, {**content, "rows": result.rows} if rows else content)
        if not result.rows:
            raise GenerateError("no sample of --shards has an expected answer that can be scored: give other shards")


if __name__ == "__main__":
    run(app)
