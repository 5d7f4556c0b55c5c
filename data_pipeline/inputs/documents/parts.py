"""Documents that are read by parts, such as pages and slides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from data_pipeline.inputs.draft import ONE_FILE, Draft, NotRead, Rejected


def with_file(found: Sequence[Draft | Rejected | NotRead]) -> Iterator[Draft | Rejected | NotRead]:
    """Yield what was read of a file, by parts. The last sample, or the last rejection, accounts for the file."""
    order = (Draft, Rejected, NotRead)
    chosen = min(range(len(found)), key=lambda number: (order.index(type(found[number])), -number))
    for number, entry in enumerate(found):
        yield replace(entry, items={**entry.items, **ONE_FILE}) if number == chosen else entry
