"""What a curriculum must know about the prompts of a shard (domain `rl`), without opening the tar.

    shards/dots-00000.tar               the prompts
    shards/dots-00000.index.arrow       index.py
    shards/dots-00000.prompts.arrow     FACTS, one row per prompt in the order of the index: written with the index
    shards/dots-00000.grades.arrow      GRADES, one row per graded prompt: written by `tools.difficulty`

Both files end with a checksum (arrow_file.py) and say which tar they describe; those of another tar are refused. Grades
are apart, and found by key, because they stay true when a shard is indexed again: answering takes days of GPU time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from common.files import replacing
from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.errors import DataError
from data_pipeline.shards.arrow_file import new_arrow_file, open_arrow_file
from data_pipeline.shards.members import index_command
from data_pipeline.shards.tar import fingerprint

FORMAT = "glmv-prompts-1"
FACTS_SUFFIX, GRADES_SUFFIX = ".prompts.arrow", ".grades.arrow"
HASHES = ("asked", "scored")
FACTS = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "verifier", "source", "category", "tier")),
        ("asked", pa.uint64()),  # hash of the prompt with its images and videos
        ("scored", pa.uint64()),  # hash of reference, verifier and settings
    ]
)
FactsRow: TypeAlias = dict[str, str | int]
GRADES = pa.schema([("key", pa.string()), ("passes", pa.int64()), ("rollouts", pa.int64())])


@dataclass
class Grades:
    """How often models have answered the prompts of a shard right.

    Attributes:
        passes: by key, the answers that were right.
        rollouts: by key, all answers.
        graders: what describes each grading, in the order in which they were added.
    """

    passes: dict[str, int] = field(default_factory=dict)
    rollouts: dict[str, int] = field(default_factory=dict)
    graders: list[dict[str, Any]] = field(default_factory=list)


def facts_path(tar: Path) -> Path:
    """Return the path of the facts of a shard's prompts."""
    return tar.with_suffix(FACTS_SUFFIX)


def grades_path(tar: Path) -> Path:
    """Return the path of the grades of a shard's prompts."""
    return tar.with_suffix(GRADES_SUFFIX)


def facts_row(key: str, prompt: RlRecord, asked: int) -> FactsRow:
    """Return a row of FACTS.

    Args:
        key: Of the sample.
        prompt: Its record.
        asked: A hash of the prompt with its images and videos.
    """
    return {
        "key": key,
        "verifier": prompt.verifier,
        "source": prompt.source,
        "category": prompt.category,
        "tier": prompt.tier,
        "asked": asked,
        "scored": hash_of([prompt.reference, prompt.verifier, prompt.settings]),
    }


def hash_of(content: Any) -> int:
    """Return a hash of JSON types."""
    return xxhash.xxh3_64_intdigest(json.dumps(content, sort_keys=True).encode())


def earlier_rows(asked: np.ndarray) -> np.ndarray:
    """Return the first row that asks the same as each row, int64 [prompts]: its own where none before it does.

    Args:
        asked: uint64 [prompts], of FACTS.
    """
    _, firsts, places = np.unique(asked, return_index=True, return_inverse=True)
    return firsts[places]


def keys_of_prompts(index: pa.Table) -> pa.ChunkedArray:
    """Return the keys of the prompts in the table of an index, string [prompts]."""
    return index.filter(pc.equal(index.column("domain"), "rl")).column("key")


def write_facts(tar: Path, rows: Sequence[FactsRow]) -> None:
    """Write the facts of a shard's prompts, before its index. Removes them if it has no prompts."""
    if not rows:
        facts_path(tar).unlink(missing_ok=True)
        return
    _write(facts_path(tar), pa.Table.from_pylist(list(rows), FACTS), {"tar_fingerprint": fingerprint(tar)})


def read_facts(tar: Path, index: pa.Table, tar_fingerprint: str, *, file: Path | None = None) -> pa.Table:
    """Return the facts of a shard's prompts: FACTS, in the order of the index.

    Args:
        tar: The shard.
        index: The table of its index.
        tar_fingerprint: The fingerprint in its index.
        file: The facts, or a copy of them; by default the file beside the shard.

    Raises:
        DataError: The file is missing, damaged, or not of this index.
    """
    keys, fix = keys_of_prompts(index), f"run {index_command(tar)}"
    if not len(keys):
        return FACTS.empty_table()
    path = file or facts_path(tar)
    if not path.is_file():
        raise DataError(f"shard {tar} has prompts but no {facts_path(tar).name}: {fix}")
    table, header = _read(path, FACTS, fix)
    if header.get("tar_fingerprint") != tar_fingerprint or table.column("key").to_pylist() != keys.to_pylist():
        raise DataError(f"{facts_path(tar)} is not of this shard's index: {fix}")
    return table


def read_grades(tar: Path, tar_fingerprint: str, *, file: Path | None = None) -> Grades:
    """Return the grades of a shard's prompts; none if it has not been graded.

    Args:
        tar: The shard.
        tar_fingerprint: The fingerprint in its index.
        file: As for `read_facts`.

    Raises:
        DataError: The file is damaged, of another tar, or a grade cannot be true.
    """
    path = file or grades_path(tar)
    fix = f"remove {path} and grade the shard again with `python -m tools.difficulty`"
    if not path.is_file():
        return Grades()
    table, header = _read(path, GRADES, fix)
    if header.get("tar_fingerprint") != tar_fingerprint:
        raise DataError(f"{path} grades another version of {tar.name}: {fix}")
    keys, passes, rollouts = (table.column(name).to_pylist() for name in GRADES.names)
    if not all(
        right is not None and answers is not None and 0 <= right <= answers
        for right, answers in zip(passes, rollouts, strict=True)
    ):
        raise DataError(f"{path} has more right answers than answers, or fewer than 0: {fix}")
    graders = header.get("graders", [])
    return Grades(dict(zip(keys, passes, strict=True)), dict(zip(keys, rollouts, strict=True)), graders)


def add_grades(tar: Path, counts: Mapping[str, tuple[int, int]], grader: Mapping[str, Any]) -> None:
    """Add a grading of a shard's prompts to those that it has; the same grader's answers are not counted twice.

    Args:
        tar: The shard.
        counts: By key: answers that were right, and all answers.
        grader: What answered, as JSON: model, seed, number of answers ...

    Raises:
        DataError: The shard has been graded by this grader, its grades cannot be read, or a new one cannot be true.
    """
    now = fingerprint(tar)
    grades = read_grades(tar, now)
    if dict(grader) in grades.graders:
        raise DataError(
            f"{grades_path(tar)} holds this grading already: {json.dumps(dict(grader), ensure_ascii=False)}"
        )
    for key, (passes, rollouts) in counts.items():
        if not 0 <= passes <= rollouts:
            raise DataError(f"{tar.name}/{key}: {passes} right answers of {rollouts} cannot be")
        grades.passes[key] = grades.passes.get(key, 0) + passes
        grades.rollouts[key] = grades.rollouts.get(key, 0) + rollouts
    keys = sorted(grades.rollouts)
    columns = [keys, [grades.passes[key] for key in keys], [grades.rollouts[key] for key in keys]]
    table = pa.Table.from_arrays(
        [pa.array(values, kind) for values, kind in zip(columns, GRADES.types, strict=True)], schema=GRADES
    )
    _write(grades_path(tar), table, {"tar_fingerprint": now, "graders": [*grades.graders, dict(grader)]})


def _write(path: Path, table: pa.Table, header: Mapping[str, Any]) -> None:
    schema = table.schema.with_metadata({"format": FORMAT, "header": json.dumps(header, ensure_ascii=False)})
    with replacing(path) as temporary, new_arrow_file(temporary, schema) as writer:
        writer.write_table(table.cast(schema))


def _read(path: Path, schema: pa.Schema, fix: str) -> tuple[pa.Table, dict[str, Any]]:
    file = open_arrow_file(path, fix)
    metadata = file.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode() or not file.schema.equals(schema):
        raise DataError(f"{path} was not written by this version: {fix}")
    try:
        header = json.loads(metadata[b"header"])
        if not isinstance(header, dict):
            raise TypeError("its header is no object")
        return file.read_all(), header
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): {fix}") from error
