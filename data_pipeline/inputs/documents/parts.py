"""Documents that are read by parts, such as pages and slides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from data_pipeline.inputs.draft import ONE_FILE, Draft, NotRead, Rejected


def with_file(found: Iterable[Draft | Rejected | NotRead]) -> Iterator[Draft | Rejected | NotRead]:
    """Yield what was read of a file, by parts. The first sample accounts for the file, else what comes last."""
    held: Draft | Rejected | NotRead | None = None
    sample = False
    for entry in found:
        if held is not None:
            yield held
        if isinstance(entry, Draft) and not sample:
            entry, sample = replace(entry, items={**entry.items, **ONE_FILE}), True
        held = entry
    if held is not None:
        yield held if sample else replace(held, items={**held.items, **ONE_FILE})
