"""Helpers that open and read inputs, and small media files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.inputs.draft import Draft, Input, NotRead, Rejected, Unit
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.sharding.accounting import FATES, Accounts
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

JPEG, PNG, MP4 = encoded(pattern(40, 60)), encoded(pattern(60, 40), "PNG"), encoded_video(4)


def opened(*paths: Path, kind: str = "", settings: Sequence[str] = ()) -> Input:
    """Return the one input that the paths stand for."""
    [(_, given)] = open_inputs([str(path) for path in paths], kind, settings)
    return given


def read(given: Input) -> tuple[list[Draft], list[Rejected]]:
    """Return all drafts and rejections.

    Every unit is read twice, in both orders, and must give the same result. Every item must be accounted for.
    """
    units = given.units()
    forwards = [list(given.read(unit)) for unit in units]
    backwards = [list(given.read(unit)) for unit in reversed(units)]
    assert forwards == backwards[::-1]
    for unit, entries in zip(units, forwards, strict=True):
        check_accounts(given, unit, entries)
    found = [entry for of_unit in forwards for entry in of_unit]
    return [x for x in found if isinstance(x, Draft)], [x for x in found if isinstance(x, Rejected)]


def check_accounts(given: Input, unit: Unit, entries: Sequence[Draft | Rejected | NotRead]) -> None:
    accounts = Accounts()
    accounts.give(given.given(unit))
    for entry in entries:
        if not isinstance(entry, NotRead):
            accounts.give(entry.given)
        accounts.use(entry.items, FATES[0])
    accounts.check(unit.path)
