"""Shards read back: against their manifest, their indexes, and by decoding every picture and clip.

| reason | what is found |
|---|---|
| `missing_shard`, `extra_shard` | the manifest names a shard that is not there, or does not know one that is |
| `wrong_checksum` | a shard's bytes are not those that were written |
| `unusable_index` | a shard's index is missing, damaged or of another tar |
| `checksum`, `unreadable_image`, `media_mismatch` ... | one sample cannot be used: see errors.BadSample |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.errors import BadSample, DataError
from data_pipeline.index import ShardIndex, find_shards, read_index
from data_pipeline.inputs.draft import Rejected
from data_pipeline.sharding.build import read_manifest
from data_pipeline.sharding.executors import EXECUTORS
from data_pipeline.sharding.measure import measure
from data_pipeline.sharding.writing import Counts, load_tokenizer
from data_pipeline.shards import ShardReader


@dataclass
class Verified:
    """What was found: samples that can be used, and all that cannot."""

    counts: Counts = field(default_factory=Counts)
    rejected: list[Rejected] = field(default_factory=list)


@dataclass(frozen=True)
class VerifyJob:
    """One shard to verify. sha256: what the manifest says of it; empty: nothing. tokenizer: its folder or empty."""

    shard: Path
    sha256: str
    tokenizer: str


def jobs_of(paths: Sequence[str], tokenizer: str) -> tuple[list[VerifyJob], list[Rejected]]:
    """The shards that paths stand for, and those that manifests and folders do not agree on. Raises DataError."""
    jobs: list[VerifyJob] = []
    wrong: list[Rejected] = []
    for path in paths:
        manifest = read_manifest(Path(path)) if Path(path).is_dir() else None
        known = {shard["file"]: shard["sha256"] for shard in manifest["shards"]} if manifest else {}
        found = [shard for shard in find_shards(path) if shard.is_file()]
        for shard in found:
            if manifest and shard.name not in known:
                wrong.append(Rejected(shard.name, "extra_shard", f"the manifest of {path} does not know it"))
            jobs.append(VerifyJob(shard, known.get(shard.name, ""), tokenizer))
        there = {shard.name for shard in found}
        for name in known.keys() - there if manifest else {s.name for s in find_shards(path)} - there:
            wrong.append(Rejected(name, "missing_shard", f"it belongs to {path}, but is not there: restore it"))
    return jobs, sorted(wrong, key=lambda entry: entry.origin)
