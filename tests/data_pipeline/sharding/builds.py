"""Small builds that the tests of sharding share."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.sharding.build import Outcome, build_shards, plan, run_build
from data_pipeline.sharding.tasks import BuildOptions
from tests.data_pipeline.crashing import Crashing

FILES, RECORDS = 10, 12


def built(records: Path, out: Path, **how) -> Outcome:
    """Build the records into small shards."""
    return build_shards(sorted(records.glob("*.jsonl")), out, shard_bytes=60_000, **how)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the shards and indexes in a folder."""
    return {name: data for name, data in contents(folder).items() if name.endswith((".tar", ".arrow"))}


def build_of(given: Crashing, out: Path, **how) -> Outcome:
    """Build an input that crashes into small tasks."""
    return run_build(plan([("crashing", given)], BuildOptions(str(out), shard_bytes=2000)), **how)
