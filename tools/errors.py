"""How commands report mistakes in the call or the input: one line on stderr, exit status 2."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from common.files import FULL_DISK
from common.storage import StorageError
from model.errors import ConfigError


def run(app: typer.Typer) -> None:
    """Run a command. A broken installation ends it with one line too, at whichever import it is found."""
    try:
        app()
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def on_a_disk(path: Path) -> Path:
    """Return a path that a command was given; end the command if it is a URL, of which `Path` keeps only one slash."""
    if re.match(r"[a-z0-9+]+:/", str(path)) and not path.exists():
        typer.echo(f"error: {str(path).partition('?')[0]} is a URL: give a folder on a disk", err=True)
        raise typer.Exit(2)
    return path


@contextmanager
def errors_in_one_line(*expected: type[Exception]) -> Iterator[None]:
    """End the command with one line on these errors and on those of files (a full disk, a missing permission)."""
    kinds: tuple[type[Exception], ...] = (*expected, OSError, StorageError)
    try:
        yield
    except kinds as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            said = f"{error.filename}: {error.strerror}"
            if error.errno in FULL_DISK:
                said += ": free space on its disk, and run the same command again"
        typer.echo(f"error: {said}", err=True)
        raise typer.Exit(2) from None
