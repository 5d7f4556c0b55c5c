"""What takes the place of a sample that cannot be used, and when a run has met too many of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.quarantine import Failure, Tally, quarantine_record, substitute

pytestmark = pytest.mark.fast

# The example of the module: rows 7 to 11, shards of six rows.
EXAMPLE = SimpleNamespace(
    lengths=np.array([9, 9, 9, 9, 9, 9, 9, 23, 30, 16, 24, 24]), shard_rows=np.array([0, 6, 12], dtype=np.int64)
)


def choices(source: SimpleNamespace, row: int, room: int, reason: str = "checksum") -> list[int]:
    """What is tried in the place of a row when everything fails for the same reason."""
    failures = [Failure(row, reason)]
    while (chosen := substitute(source, room, 8, failures)) is not None:
        failures.append(Failure(chosen, reason))
    return [failure.row for failure in failures[1:]]


def test_the_example():
    assert choices(EXAMPLE, 7, 24) == [10, 11, 9]
    assert choices(EXAMPLE, 7, 8) == []


def test_an_unreadable_shard_is_left_for_the_next_one():
    assert choices(EXAMPLE, 2, 24, "unreadable_shard") == [7]
    assert choices(EXAMPLE, 10, 24, "unreadable_shard") == [0]
    assert choices(EXAMPLE, 10, 16) == [0, 1, 2]


def expected(lengths: Sequence[int], shards: Sequence[int], room: int, failures: Sequence[Failure]) -> int | None:
    """The rule as a person would say it. shards: of every row."""
    if len(failures) > 3:
        return None
    lost = [shards[failure.row] for failure in failures if failure.reason == "unreadable_shard"]
    row = max(r for r in range(len(lengths)) if shards[r] == lost[-1]) if lost else failures[0].row
    best, best_length = None, 0
    for _ in range(min(256, len(lengths))):
        row = (row + 1) % len(lengths)
        padded = (lengths[row] + 7) // 8 * 8
        tried = row in [failure.row for failure in failures] or shards[row] in lost
        if not tried and best_length < padded <= room:
            best, best_length = row, padded
    return best


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_on_random_sources(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 120, rng.integers(1, 8))
    lengths = rng.integers(1, 90, sizes.sum())
    source = SimpleNamespace(lengths=lengths.astype(np.int32), shard_rows=np.concatenate([[0], np.cumsum(sizes)]))
    shards = np.repeat(np.arange(len(sizes)), sizes).tolist()
    for row in rng.integers(0, len(lengths), 20).tolist():
        room = (int(lengths[row]) + 7) // 8 * 8
        failures = [Failure(row, str(rng.choice(["checksum", "unreadable_shard"])))]
        while True:
            chosen = substitute(source, room, 8, failures)
            assert chosen == expected(lengths.tolist(), shards, room, failures)
            if chosen is None:
                break
            failures.append(Failure(chosen, str(rng.choice(["checksum", "unreadable_shard"]))))


def test_the_rate_counts_after_ten_in_a_thousand():
    tally = Tally()
    tally.add(90, [quarantine_record("checksum", "a.tar", str(n), "") for n in range(10)])
    tally.check(0.01, "quarantine.jsonl")
    tally.add(0, [quarantine_record("unreadable_image", "a.tar", "17", "")])
    with pytest.raises(
        DataError,
        match=r"11 of the first 101 samples could not be used \(10 checksum, 1 unreadable_image\), more than "
        r"data.max_quarantined_fraction 0.01 allows: mend what run/quarantine.jsonl names, or allow more",
    ):
        tally.check(0.01, "run/quarantine.jsonl")
    tally.add(999, [])
    tally.check(0.01, "quarantine.jsonl")  # 11 of 1100


def test_what_the_plan_refuses_is_no_damage():
    tally = Tally()
    tally.add(10, [quarantine_record("too_long", "a.tar", "1", "")])
    tally.check(0, "quarantine.jsonl")
    tally.add(10, [quarantine_record("checksum", "a.tar", "1", "")])
    with pytest.raises(DataError, match="1 of the first 21 samples"):
        tally.check(0, "quarantine.jsonl")
    tally.check(1, "quarantine.jsonl")


def test_the_tally_survives_a_restart():
    tally = Tally()
    tally.add(5, [quarantine_record("checksum", "a.tar", "1", "")])
    again = Tally()
    again.load_state_dict(tally.state_dict())
    again.add(5, [quarantine_record("checksum", "a.tar", "2", "")])
    assert again.state_dict() == {"samples": 12, "reasons": {"checksum": 2}}
