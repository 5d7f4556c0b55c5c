"""What stays, as an input of sharding (inputs.draft.Input): recaptioned on its way, where the recipe says so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_text
from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.decide import Examined
from data_pipeline.curation.examine import read_entries
from data_pipeline.curation.filters import Drop
from data_pipeline.curation.hashing import digest
from data_pipeline.curation.recaption import Recaption, Recaptioner
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.media import as_media
from data_pipeline.inputs.names import shown_names

UNIT_BYTES = 16 << 20
_AT_ONCE = 64  # samples, of which the chosen ones are recaptioned together


@dataclass
class KeptSamples:
    """paths: the shards. recaption: the options of Recaption; none for captions as they are. A unit is a run of samples
    of one shard, and its `extra` says which of them stay, a bit each.

    chosen: the units, as units_of gives them. notes: a folder for answers, and for what became of recaptioning; no
    sample depends on it.
    """

    paths: tuple[str, ...]
    recaption: dict[str, Any]
    chosen: InitVar[Sequence[Unit]]
    notes: InitVar[Path]

    def __post_init__(self, chosen: Sequence[Unit], notes: Path) -> None:
        self._chosen, self._notes = chosen, notes

    def units(self) -> Sequence[Unit]:
        return self._chosen

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        samples = self._samples(unit)
        if not self.recaption:
            for sample in samples:
                yield sample if isinstance(sample, Rejected) else draft_of(sample, sample.record)
            return
        options = Recaption(**self.recaption)
        notes = self._notes / digest(unit.path.encode(), str(unit.start).encode()).hex()
        chosen, failed = 0, []
        with Recaptioner(options, notes.with_suffix(".answers.jsonl"), lambda *said: failed.append(said)) as captioner:
            while several := list(islice(samples, _AT_ONCE)):
                readable = [sample for sample in several if isinstance(sample, Candidate)]
                records = iter(captioner.records(readable))
                for sample in several:
                    yield sample if isinstance(sample, Rejected) else draft_of(sample, next(records))
                chosen += sum(map(options.chosen, readable))
        write_text(notes.with_suffix(".json"), json.dumps({"chosen": chosen, "failed": sorted(failed)}))

    def _samples(self, unit: Unit) -> Iterator[Candidate | Rejected]:
        stays = np.unpackbits(np.frombuffer(bytes.fromhex(unit.extra["stays"]), np.uint8))
        rows = unit.start + np.flatnonzero(stays[: unit.stop - unit.start])
        shown = shown_names(self.paths)[unit.path]
        for entry in read_entries(Path(unit.path), shown, rows.tolist()):
            if isinstance(entry.sample, Drop):  # the shard has changed since it was examined
                yield Rejected(f"{shown}/{entry.key}", entry.sample.reason, entry.sample.detail)
            else:
                yield entry.sample


def units_of(examined: Examined, stays: np.ndarray) -> list[Unit]:
    """stays: bool [samples] -> units of about UNIT_BYTES of samples that stay."""
    units = []
    for shard, (task, table) in enumerate(zip(examined.tasks, examined.tables, strict=True)):
        there = stays[examined.rows_of(shard)]
        ends = np.cumsum(np.where(there, table.column("bytes").to_numpy(), 0))
        cuts = np.flatnonzero(np.diff(ends // UNIT_BYTES)) + 1
        for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(there)], strict=True):
            if there[start:stop].any():
                size = int(ends[stop - 1] - (ends[start - 1] if start else 0))
                units.append(
                    Unit(task.shard, start, stop, size, {"stays": np.packbits(there[start:stop]).tobytes().hex()})
                )
    return units


def draft_of(sample: Candidate, record: dict[str, Any]) -> Draft:
    """The sample as it goes into a shard. What its record says of its source stays its source."""
    record = dict(record)
    origin = record.pop("source", sample.name)
    images, videos = ([_media(data) for data in files] for files in (sample.images, sample.videos))
    return Draft(record, images, videos, origin if isinstance(origin, str) else sample.name)


def recaption_notes(notes: Path) -> tuple[int, list[tuple[str, str]]]:
    """(samples chosen, (sample, why) of those that keep what they had), of all units that were read."""
    chosen, failed = 0, []
    for file in sorted(notes.glob("*.json")):
        note = json.loads(file.read_text())
        chosen += note["chosen"]
        failed += [(name, reason) for name, reason in note["failed"]]
    return chosen, sorted(failed)


def _media(data: bytes) -> Media:
    return as_media(data)[1]
