"""A progress bar of bytes on stderr, if it is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def bytes_bar(what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show a bar, and yield a function that sets how many bytes are done.

    The bar is drawn by the caller alone: a thread that draws could hold a lock while processes are forked.
    """
    stderr = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=stderr, transient=True, disable=not stderr.is_terminal, auto_refresh=False
    ) as progress:
        task = progress.add_task(what, total=total, completed=done)

        def show(completed: int) -> None:
            progress.update(task, completed=completed)
            progress.refresh()

        yield show
