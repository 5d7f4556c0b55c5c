"""Which sample replaces one that cannot be used, and when a run has too many of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError, UnusedSample
from data_pipeline.loading.quarantine import Failure, Tally, substitute

pytestmark = pytest.mark.fast

# The example of the module: rows 7 to 11, shards of six rows.
EXAMPLE = SimpleNamespace(
    lengths=np.array([9, 9, 9, 9, 9, 9, 9, 23, 30, 16, 24, 24]), shard_rows=np.array([0, 6, 12], dtype=np.int64)
)


def choices(source: SimpleNamespace, row: int, space: int, reason: str = "checksum") -> list[int]:
    """Return the replacements that are tried for a row if all of them fail for the same reason."""
    failures = [Failure(row, reason)]
    while (chosen := substitute(source, space, 8, failures)) is not None:
        failures.append(Failure(chosen, reason))
    return [failure.row for failure in failures[1:]]


def test_replacements_of_the_worked_example():
    assert choices(EXAMPLE, 7, 24) == [10, 11, 9]
    assert choices(EXAMPLE, 7, 8) == []


def test_replacement_for_an_unreadable_shard_comes_from_the_next_one():
    assert choices(EXAMPLE, 2, 24, "unreadable_shard") == [7]
    assert choices(EXAMPLE, 10, 24, "unreadable_shard") == [0]
    assert choices(EXAMPLE, 10, 16) == [0, 1, 2]


def expected(lengths: Sequence[int], shards: Sequence[int], space: int, failures: Sequence[Failure]) -> int | None:
    """Apply the rule row by row. shards: the shard of every row."""
    if len(failures) > 3:
        return None
    lost = [shards[failure.row] for failure in failures if failure.reason == "unreadable_shard"]
    row = max(r for r in range(len(lengths)) if shards[r] == lost[-1]) if lost else failures[0].row
    best, best_length = None, 0
    for _ in range(min(256, len(lengths))):
        row = (row + 1) % len(lengths)
        padded = (lengths[row] + 7) // 8 * 8
        tried = row in [failure.row for failure in failures] or shards[row] in lost
        if not tried and best_length < padded <= space:
            best, best_length = row, padded
    return best


@pytest.mark.parametrize("seed", range(20))
def test_replacements_in_random_sources_follow_the_rule(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 120, rng.integers(1, 8))
    lengths = rng.integers(1, 90, sizes.sum())
    source = SimpleNamespace(lengths=lengths.astype(np.int32), shard_rows=np.concatenate([[0], np.cumsum(sizes)]))
    shards = np.repeat(np.arange(len(sizes)), sizes).tolist()
    for row in rng.integers(0, len(lengths), 20).tolist():
        space = (int(lengths[row]) + 7) // 8 * 8
        failures = [Failure(row, str(rng.choice(["checksum", "unreadable_shard"])))]
        while True:
            chosen = substitute(source, space, 8, failures)
            assert chosen == expected(lengths.tolist(), shards, space, failures)
            if chosen is None:
                break
            failures.append(Failure(chosen, str(rng.choice(["checksum", "unreadable_shard"]))))


def quarantined(reason: str, key: str = "1") -> dict[str, Any]:
    """Return a line of quarantine.jsonl."""
    return UnusedSample(reason, "", shard="a.tar", key=key, replaced_by="").as_json()


def test_run_stops_above_the_quarantined_fraction_of_a_thousand_samples():
    tally = Tally()
    tally.add(90, [quarantined("checksum", str(n)) for n in range(10)])
    tally.check(0.01, "quarantine.jsonl")
    tally.add(0, [quarantined("unreadable_image")])
    with pytest.raises(
        DataError,
        match=r"11 of the first 101 samples could not be used \(10 checksum, 1 unreadable_image\), more than "
        r"data.max_quarantined_fraction 0.01 allows: fix the samples listed in run/quarantine.jsonl, or raise",
    ):
        tally.check(0.01, "run/quarantine.jsonl")
    tally.add(999, [])
    tally.check(0.01, "quarantine.jsonl")  # 11 of 1100


def test_samples_that_are_too_long_do_not_count_as_quarantined():
    tally = Tally()
    tally.add(10, [quarantined("too_long")])
    tally.check(0, "quarantine.jsonl")
    tally.add(10, [quarantined("checksum")])
    with pytest.raises(DataError, match="1 of the first 21 samples"):
        tally.check(0, "quarantine.jsonl")
    tally.check(1, "quarantine.jsonl")


def test_tally_survives_a_restart():
    tally = Tally()
    tally.add(5, [quarantined("checksum")])
    again = Tally()
    again.load_state_dict(tally.state_dict())
    again.add(5, [quarantined("checksum", "2")])
    assert again.state_dict() == {"samples": 12, "reasons": {"checksum": 2}}
