"""From a command line to a run: shared by the entries of all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.config import RunConfig, load_config
from training.errors import expected_errors
from training.loop import run


def main(schema: type[RunConfig], description: str | None) -> None:
    """Read the command line and train.

    Args:
        schema: the stage's configuration.
        description: for --help, the entry's docstring.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=description)
    def train(
        config: Annotated[Path, typer.Option(help="The run's YAML file.")],
        overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, over the file.")] = None,
    ) -> None:
        with expected_errors(on_every_process=False):
            run(load_config(schema, config, overrides or ()))

    app()
