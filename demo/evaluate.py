"""What the demo measures on held-out samples: losses, and answers to questions about images.

The production side packs the samples and runs the model of the last checkpoint. The exported side loads the Hugging
Face folder: there transformers computes positions, vision tower, decoder and loss, one sample at a time. Both read the
samples as training does (`encode_record`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DataError
from tools.errors import errors_in_one_line, run

# Each side runs in a process of its own, so that neither sees what the other sets up.

app = typer.Typer(add_completion=False, rich_markup_mode=None)
Shards = Annotated[list[Path], typer.Argument(help="folders of held-out shards")]


@app.command()
def production(run: Annotated[Path, typer.Argument(help="run folder")], shards: Shards) -> None:
    """Print the production model's loss as JSON."""
    from demo.held_out import production_loss
    from model.errors import CheckpointError

    with errors_in_one_line(CheckpointError, DataError):
        print(json.dumps(production_loss(run, shards)))


@app.command()
def exported(
    folder: Annotated[Path, typer.Argument(help="exported Hugging Face folder")],
    shards: Shards,
    descriptions: Annotated[Path, typer.Option(help="shards of descriptions of one image each")],
    questions: Annotated[Path, typer.Option(help="shards of questions about one image each")],
    records: Annotated[Path, typer.Option(help="folder that holds media/held_out")],
) -> None:
    """Print what transformers computes as JSON: losses, shares of right answers, and answers to show."""
    from demo.held_out import exported_figures
    from tools.exported import GenerateError

    with errors_in_one_line(DataError, GenerateError):
        print(json.dumps(exported_figures(folder, shards, descriptions, questions, records)))


if __name__ == "__main__":
    run(app)
