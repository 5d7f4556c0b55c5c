"""From a command line to a run: shared by the entries of all stages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DataError
from model.checkpoint import CheckpointError
from model.config import ConfigError
from model.safetensors_folder import WeightsError
from pretrain.config import RunConfig, load_config
from pretrain.distributed import rank
from pretrain.loop import run
from pretrain.step import NonFiniteStep

EXPECTED_ERRORS = (ConfigError, DataError, CheckpointError, WeightsError, NonFiniteStep)


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
        exit_on_expected_errors(lambda: run(load_config(schema, config, overrides or ())))

    app()


def exit_on_expected_errors(action: Callable[[], None]) -> None:
    """Say in one line what is wrong, on one process, and exit with 2."""
    try:
        action()
    except EXPECTED_ERRORS as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
