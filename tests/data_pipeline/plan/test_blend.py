"""The blended stream of pieces: its order against the greedy rule, its cuts against every block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.plan.blend import Stream, StreamPosition, blend, cut_between_blocks, positions_after
from data_pipeline.plan.shuffle import SHARDS_TOGETHER, Shuffle
from tests.data_pipeline.source_files import Table, table

pytestmark = pytest.mark.fast

SEQ_LENGTH = 256


def streams(*tables: Table, too_long: str = "refuse") -> list[Stream]:
    return [
        Stream(source, index, seed=0, seq_length=SEQ_LENGTH, too_long=too_long) for index, source in enumerate(tables)
    ]


def blended(
    tables: list[Table], max_tokens: int, positions: list[StreamPosition] | None = None, *, multiple: int = 1, **options
):
    """Return (source, row, start, length) of the next pieces, whether they are the last, and the new positions."""
    positions = positions or [StreamPosition()] * len(tables)
    pieces, ended = blend(streams(*tables, **options), positions, max_tokens, multiple)
    columns = (pieces.source, pieces.row, pieces.start, pieces.length)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    return rows, ended, list(positions_after(positions, pieces))


# --- shuffling --------------------------------------------------------------------------------------------------------


def test_every_row_comes_once_per_epoch_in_a_new_order():
    shuffle = Shuffle(np.array([0, 30, 30, 71, 100]), seed=3, name="one")
    epochs = shuffle.rows(0, 300).reshape(3, 100).tolist()
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_range_of_the_order_can_be_read_alone():
    bounds = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(0, 9, 50))])
    whole = Shuffle(bounds, seed=3, name="one").rows(0, 900)
    rng = np.random.default_rng(1)
    for _ in range(100):
        start, count = int(rng.integers(800)), int(rng.integers(100))
        assert Shuffle(bounds, seed=3, name="one").rows(start, count).tolist() == whole[start : start + count].tolist()


def test_reads_stay_within_a_few_shards():
    """With 100 shards of 50 rows, 800 consecutive rows come from one group of 16 shards, in random order."""
    rows = Shuffle(np.arange(0, 5001, 50), seed=0, name="one").rows(0, 5000)
    groups = rows[: 96 * 50].reshape(-1, SHARDS_TOGETHER * 50) // 50
    assert all(len(set(group)) == SHARDS_TOGETHER for group in groups.tolist())
    # Shards and the rows of a group are in random order.
    assert sorted(set(groups[0].tolist())) != list(range(SHARDS_TOGETHER))
    assert len(set(groups[0][:50].tolist())) > SHARDS_TOGETHER // 2


def test_order_depends_on_seed_and_name():
    orders = [
        Shuffle(np.array([0, 50]), seed=seed, name=name).rows(0, 50).tolist()
        for seed, name in ((0, "one"), (1, "one"), (0, "two"))
    ]
    assert len({tuple(order) for order in orders}) == 3


# --- blending ---------------------------------------------------------------------------------------------------------


def by_the_rule(tables: list[Table]) -> Iterator[tuple[int, int]]:
    """Yield (source, row) by the greedy rule, one after the other."""
    orders = [stream.take(0, 2000).row.tolist() for stream in streams(*tables)]
    used, tokens = [0] * len(tables), [0] * len(tables)
    while True:
        live = [s for s in range(len(tables)) if not tables[s].epochs or used[s] < len(tables[s].lengths)]  # one epoch
        source = min(live, key=lambda s: (tokens[s] / tables[s].weight, s))
        row = orders[source][used[source]]
        used[source] += 1
        tokens[source] += int(tables[source].lengths[row])
        yield source, row


def test_blend_of_the_worked_example():
    pieces, _, positions = blended([Table("a", np.array([4]), 2.0), Table("b", np.array([3]), 1.0)], 25)
    assert "".join("ab"[source] for source, *_ in pieces) == "abab" + "aab"
    assert positions == [StreamPosition(4, 0, 16), StreamPosition(3, 0, 9)]


def test_blend_follows_the_greedy_rule():
    tables = [table("a", 2.0, 50), table("bc", 1.0, 70, high=30), table("def", 0.3, 20, low=100)]
    pieces, ended, _ = blended(tables, 50_000)
    assert not ended
    assert [piece[:2] for piece in pieces] == list(itertools.islice(by_the_rule(tables), len(pieces)))
    assert 50_000 - 200 < sum(length for *_, length in pieces) <= 50_000


@pytest.mark.parametrize("amounts", [[7] * 50, [1000] * 20, [3000, 1, 9000]])
def test_resuming_from_any_position_gives_the_same_stream(amounts):
    tables = [table("a", 2.0, 50, high=400, domain="text"), table("bc", 1.0, 70, high=30), table("def", 0.3, 20)]
    whole, _, _ = blended(tables, 12_000)
    positions, resumed = None, []
    for amount in amounts:
        pieces, _, positions = blended(tables, max(amount, SEQ_LENGTH), positions)
        resumed += pieces
    shortest = min(len(resumed), len(whole))
    assert resumed[:shortest] == whole[:shortest]
    assert shortest > 100


def test_token_shares_follow_the_weights_to_within_one_sample():
    tables = [table("short", 3.0, 400, low=5, high=30), table("long", 1.0, 50, low=100, high=200)]
    pieces, _, positions = blended(tables, 200_000)
    tokens = [sum(length for source, *_, length in pieces if source == wanted) for wanted in (0, 1)]
    assert [position.tokens for position in positions] == tokens
    assert abs(tokens[0] / 3 - tokens[1]) < 200  # the longest sample


def test_padding_uses_space_but_does_not_count_for_the_weights():
    pieces, _, _ = blended([Table("a", np.array([5]))], 100, multiple=8)
    assert len(pieces) == 12


def test_used_up_source_leaves_and_the_others_continue():
    once, forever = table("a", 1.0, 50, epochs=1), table("bc", 1.0, 70)
    pieces, ended, positions = blended([once, forever], 30_000)
    assert not ended
    assert sorted(row for source, row, *_ in pieces if source == 0) == list(range(50))
    assert [piece[:2] for piece in pieces] == list(itertools.islice(by_the_rule([once, forever]), len(pieces)))
    assert positions[0].samples == 50


@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
def test_every_sample_comes_as_often_as_epochs_says(epochs):
    pieces, ended, _ = blended([table("a", 1.0, 50, epochs=epochs), table("bc", 1.0, 30, epochs=1)], 10**6)
    assert ended
    counts = np.bincount([row for source, row, *_ in pieces if source == 0], minlength=50)
    assert counts.sum() == 50 * epochs
    assert {int(count) for count in counts} <= {int(np.floor(epochs)), int(np.ceil(epochs))}
    assert blended([table("a", 1.0, 50, epochs=1)], 10**6, [StreamPosition(50)])[:2] == ([], True)


# --- samples longer than a sequence -----------------------------------------------------------------------------------


def test_cuts_of_the_worked_example():
    assert cut_between_blocks(10, [(3, 4)], 6) == [(0, 3), (3, 6), (9, 1)]
    assert cut_between_blocks(10, [(3, 7)], 6) == [(0, 3)]
    assert cut_between_blocks(10, [(0, 7)], 6) == []


def test_cuts_avoid_blocks_and_pieces_are_as_long_as_possible():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        seq_length, position, blocks = int(rng.integers(4, 20)), 0, []
        for _ in range(int(rng.integers(0, 8))):
            position += int(rng.integers(0, 6))
            blocks.append((position, int(rng.integers(1, seq_length + 1))))
            position += blocks[-1][1]
        length = position + int(rng.integers(0, 9)) or 1
        pieces = cut_between_blocks(length, blocks, seq_length)
        assert [start for start, _ in pieces] == [sum(size for _, size in pieces[:n]) for n in range(len(pieces))]
        assert sum(size for _, size in pieces) == length
        inside = {token for start, size in blocks for token in range(start + 1, start + size)}
        for (start, size), following in itertools.zip_longest(pieces, pieces[1:]):
            assert 0 < size <= seq_length
            assert start not in inside
            # A piece that is not full could not end any later.
            if following is not None:
                assert all(end in inside for end in range(start + size + 1, start + seq_length + 1))


def test_text_is_split_by_every_rule():
    for rule in ("refuse", "truncate", "split"):
        pieces, *_ = blended([Table("a", np.array([600]), domain="text")], 600, too_long=rule)
        assert pieces == [(0, 0, 0, 256), (0, 0, 256, 256), (0, 0, 512, 88)]


@pytest.mark.parametrize(
    ("rule", "domain", "blocks", "expected"),
    [
        ("refuse", "interleaved", [(2, 100)], [(0, 0)]),
        ("truncate", "interleaved", [(2, 100), (200, 100)], [(0, 200)]),
        ("truncate", "chat", [(2, 100)], [(0, 256)]),
        ("truncate", "video", [(2, 300)], [(0, 0)]),  # the beginning has no image
        ("split", "interleaved", [(2, 100), (200, 100)], [(0, 200), (200, 256), (456, 144)]),
        ("split", "chat", [(2, 100)], [(0, 0)]),
        ("split", "video", [(0, 300)], [(0, 0)]),
        ("split", "interleaved", [(10, 100), (150, 300)], [(0, 0)]),
        ("truncate", "interleaved", [(10, 100), (150, 300)], [(0, 150)]),
    ],
)
def test_long_samples_are_cut_by_rule(rule, domain, blocks, expected):
    """(0, 0): too long."""
    long = Table("a", np.array([600, 40]), domain=domain, images={0: blocks}, epochs=1)
    pieces, ended, positions = blended([long], 10_000, too_long=rule)
    assert [(start, length) for _, row, start, length in pieces if row == 0] == expected
    assert [length for _, row, _, length in pieces if row == 1] == [40]
    assert ended
    assert positions[0].samples == 2


def test_patches_belong_to_the_piece_with_their_block():
    long = Table("a", np.array([600]), domain="interleaved", images={0: [(2, 100), (300, 50)]}, epochs=1)
    pieces, _ = blend(streams(long, too_long="split"), [StreamPosition()], 10_000, 8)
    assert pieces.patches.tolist() == [400, 200, 0]


def test_source_in_which_nothing_fits_is_refused():
    with pytest.raises(DataError, match=r"source 'one' has no sample that fits train\.seq_length 256 .*600 tokens"):
        streams(Table("one", np.array([600])))
    with pytest.raises(DataError, match=r"source 'one' has no samples: .* rejected\.jsonl"):
        streams(Table("one", np.array([], dtype=np.int64)))
    with pytest.raises(DataError, match=r"no sample of source 'one' can be cut to train\.seq_length 256"):
        blended([Table("one", np.array([600]), images={0: [(0, 300)]})], 1000, too_long="split")


def test_single_sample_that_fits_may_come_early_in_one_epoch_and_late_in_the_next():
    """In between are up to two epochs of samples, all of them too long."""
    lengths = np.full(16, 1000)
    lengths[3] = 64
    made = streams(Table("a", lengths, 1.0), Table("b", np.full(50, 30), 50.0))
    positions: tuple[StreamPosition, ...] = (StreamPosition(), StreamPosition())
    first_source: list[int] = []
    for _ in range(60):
        pieces, _ = blend(made, positions, 1000, 8)
        positions = positions_after(positions, pieces)
        first_source += pieces.length[pieces.source == 0].tolist()
    used = np.flatnonzero(first_source)
    assert np.diff(used).max() > 16
    assert len(used) > 10


@pytest.mark.parametrize("rule", ["truncate", "split"])
def test_long_samples_are_cut_only_when_needed(rule, monkeypatch):
    """A document of 600 tokens gives at least 256: of 10,000 documents, 2560 tokens need ten at most."""
    long = Table("a", np.full(10_000, 600), domain="interleaved")
    looked_at: list[int] = []

    def blocks(row: int) -> list[tuple[int, int]]:
        looked_at.append(row)
        return []

    monkeypatch.setattr(long, "blocks", blocks)
    pieces, *_ = blended([long], 2560, too_long=rule)
    assert sum(length for *_, length in pieces) > 2560 - 256
    assert len(looked_at) < 40


def test_source_used_up_long_ago_does_not_delay_the_others():
    once, forever = table("a", 1.0, 50, epochs=1), table("bc", 1.0, 70)
    pieces, ended, _ = blended([once, forever], 5000, [StreamPosition(50, 0, 5000), StreamPosition(10**10, 0, 10**12)])
    assert not ended
    assert 5000 - 200 < sum(length for *_, length in pieces) <= 5000
