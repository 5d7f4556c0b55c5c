"""From a command line to a run: shared by the entries of all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.config import RunConfig, load_config
from training.errors import expected_errors
from training.keys import help_command
from training.loop import run


def main(schema: type[RunConfig], description: str | None) -> None:
    """Read the command line and train.

    Args:
        schema: the stage's configuration.
        description: the entry's docstring, for --help.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    unwrapped = (description or "").replace("\n\n", "\n\n\b\n")  # click would join the lines of a paragraph

    @app.command(cls=help_command(schema), help=unwrapped)
    def train(
        config: Annotated[Path, typer.Option(help="the run's YAML file")],
        overrides: Annotated[
            list[str] | None, typer.Argument(help="keys that replace those of the file", metavar="dotted.key=value")
        ] = None,
    ) -> None:
        with expected_errors(on_every_process=False):
            run(load_config(schema, config, overrides or ()))

    app()
