"""The kept samples as an input of a build (inputs.draft.Input), with new captions where the recipe asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_text
from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.decide import Examined
from data_pipeline.curation.examine import read_entries
from data_pipeline.curation.filters import Filtered
from data_pipeline.curation.hashing import digest
from data_pipeline.curation.recaption import Recaption, Recaptioner
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.media import as_media
from data_pipeline.inputs.names import shown_names

UNIT_BYTES = 16 << 20
ONE_SAMPLE = {"samples": 1}  # items of a draft that is one sample of a shard
_BATCH = 64  # samples that are recaptioned together


@dataclass
class KeptSamples:
    """The kept samples of shards. A unit is a row range of one shard; its `extra` has one bit per row: kept or not."""

    paths: tuple[str, ...]  # the shards
    recaption: dict[str, Any]  # the options of Recaption; empty: keep the captions
    chosen: InitVar[Sequence[Unit]]  # the units, from units_of
    notes: InitVar[Path]  # folder for answers and failures of recaptioning; the samples do not depend on it

    def __post_init__(self, chosen: Sequence[Unit], notes: Path) -> None:
        """Keep what a build does not describe in its manifest."""
        self._chosen, self._notes = chosen, notes

    def units(self) -> Sequence[Unit]:
        """Return the units."""
        return self._chosen

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the kept samples."""
        return {"samples": int.from_bytes(bytes.fromhex(unit.extra["kept"])).bit_count()}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the kept samples of a unit."""
        samples = self._samples(unit)
        if not self.recaption:
            for sample in samples:
                yield sample if isinstance(sample, Rejected) else draft_of(sample, sample.record)
            return
        options = Recaption(**self.recaption)
        notes = self._notes / digest(unit.path.encode(), str(unit.start).encode()).hex()
        chosen, failed = 0, []
        with Recaptioner(options, notes.with_suffix(".answers.jsonl"), lambda *said: failed.append(said)) as captioner:
            while batch := list(islice(samples, _BATCH)):
                readable = [sample for sample in batch if isinstance(sample, Candidate)]
                records = iter(captioner.records(readable))
                for sample in batch:
                    yield sample if isinstance(sample, Rejected) else draft_of(sample, next(records))
                chosen += sum(map(options.chosen, readable))
        write_text(notes.with_suffix(".json"), json.dumps({"chosen": chosen, "failed": sorted(failed)}))

    def _samples(self, unit: Unit) -> Iterator[Candidate | Rejected]:
        kept = np.unpackbits(np.frombuffer(bytes.fromhex(unit.extra["kept"]), np.uint8))
        rows = unit.start + np.flatnonzero(kept[: unit.stop - unit.start])
        shown = shown_names(self.paths)[unit.path]
        for entry in read_entries(Path(unit.path), shown, rows.tolist()):
            if isinstance(entry.sample, Filtered):  # the shard has changed since it was examined
                yield Rejected(f"{shown}/{entry.key}", entry.sample.reason, entry.sample.detail, ONE_SAMPLE)
            else:
                yield entry.sample


def units_of(examined: Examined, kept: np.ndarray) -> list[Unit]:
    """Return units of about UNIT_BYTES of kept samples each.

    Args:
        examined: The results of the first pass.
        kept: Whether each sample is kept, bool [samples].
    """
    units = []
    for shard, (task, table) in enumerate(zip(examined.tasks, examined.tables, strict=True)):
        rows = kept[examined.rows_of(shard)]
        ends = np.cumsum(np.where(rows, table.column("bytes").to_numpy(), 0))
        cuts = np.flatnonzero(np.diff(ends // UNIT_BYTES)) + 1
        for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            if rows[start:stop].any():
                size = int(ends[stop - 1] - (ends[start - 1] if start else 0))
                bits = np.packbits(rows[start:stop]).tobytes().hex()
                units.append(Unit(task.shard, start, stop, size, {"kept": bits}))
    return units


def draft_of(sample: Candidate, record: dict[str, Any]) -> Draft:
    """Return the draft of a sample, with the source that its record names."""
    record = dict(record)
    origin = record.pop("source", sample.name)
    images, videos = ([_media(data) for data in files] for files in (sample.images, sample.videos))
    return Draft(record, images, videos, origin if isinstance(origin, str) else sample.name, ONE_SAMPLE)


def recaption_notes(notes: Path) -> tuple[int, list[tuple[str, str]]]:
    """Return the number of samples chosen for recaptioning, and (sample, why) of those that failed, of all units."""
    chosen, failed = 0, []
    for file in sorted(notes.glob("*.json")):
        note = json.loads(file.read_text())
        chosen += note["chosen"]
        failed += [(name, reason) for name, reason in note["failed"]]
    return chosen, sorted(failed)


def _media(data: bytes) -> Media:
    return as_media(data)[1]
