"""The stream of pieces: its order against the greedy rule in words, its cuts against every block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.plan.blend import Place, Stream, blend, cut_between_blocks, places_after
from data_pipeline.plan.shuffle import SHARDS_TOGETHER, Shuffle
from tests.data_pipeline.source_files import Table, table

pytestmark = pytest.mark.fast

SEQ_LENGTH = 256


def streams(*tables: Table, too_long: str = "refuse") -> list[Stream]:
    return [
        Stream(source, place, seed=0, seq_length=SEQ_LENGTH, too_long=too_long) for place, source in enumerate(tables)
    ]


def drawn(tables: list[Table], room: int, places: list[Place] | None = None, *, multiple: int = 1, **options):
    """(source, row, start, length) of the next pieces, whether they are the last, and the places after them."""
    places = places or [Place()] * len(tables)
    pieces, ended = blend(streams(*tables, **options), places, room, multiple)
    columns = (pieces.source, pieces.row, pieces.start, pieces.length)
    return list(zip(*(column.tolist() for column in columns), strict=True)), ended, list(places_after(places, pieces))


# --- shuffling --------------------------------------------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_in_a_new_order():
    shuffle = Shuffle(np.array([0, 30, 30, 71, 100]), seed=3, name="one")
    epochs = shuffle.rows(0, 300).reshape(3, 100).tolist()
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_stretch_of_the_order_can_be_had_alone():
    bounds = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(0, 9, 50))])
    whole = Shuffle(bounds, seed=3, name="one").rows(0, 900)
    random = np.random.default_rng(1)
    for _ in range(100):
        start, count = int(random.integers(800)), int(random.integers(100))
        assert Shuffle(bounds, seed=3, name="one").rows(start, count).tolist() == whole[start : start + count].tolist()


def test_reads_stay_within_a_few_shards():
    """Of 100 shards of 50 rows, any 800 rows in turn lie in at most two groups of shards; all shards are mixed."""
    rows = Shuffle(np.arange(0, 5001, 50), seed=0, name="one").rows(0, 5000)
    groups = rows[: 96 * 50].reshape(-1, SHARDS_TOGETHER * 50) // 50
    assert all(len(set(group)) == SHARDS_TOGETHER for group in groups.tolist())
    # Shards and the rows of a group come in a drawn order.
    assert sorted(set(groups[0].tolist())) != list(range(SHARDS_TOGETHER))
    assert len(set(groups[0][:50].tolist())) > SHARDS_TOGETHER // 2


def test_the_order_is_drawn_from_seed_and_name():
    orders = [
        Shuffle(np.array([0, 50]), seed=seed, name=name).rows(0, 50).tolist()
        for seed, name in ((0, "one"), (1, "one"), (0, "two"))
    ]
    assert len({tuple(order) for order in orders}) == 3


# --- blending ---------------------------------------------------------------------------------------------------------


def by_the_rule(tables: list[Table]) -> Iterator[tuple[int, int]]:
    """(source, row) as the greedy rule draws them, one after the other."""
    orders = [stream.draw(0, 2000).row.tolist() for stream in streams(*tables)]
    used, tokens = [0] * len(tables), [0] * len(tables)
    while True:
        left = [s for s in range(len(tables)) if not tables[s].epochs or used[s] < len(tables[s].lengths)]  # one epoch
        source = min(left, key=lambda s: (tokens[s] / tables[s].weight, s))
        row = orders[source][used[source]]
        used[source] += 1
        tokens[source] += int(tables[source].lengths[row])
        yield source, row


def test_the_worked_example():
    pieces, _, places = drawn([Table("a", np.array([4]), 2.0), Table("b", np.array([3]), 1.0)], 25)
    assert "".join("ab"[source] for source, *_ in pieces) == "abab" + "aab"
    assert places == [Place(4, 0, 16), Place(3, 0, 9)]


def test_the_blend_is_the_greedy_rule():
    tables = [table("a", 2.0, 50), table("bc", 1.0, 70, high=30), table("def", 0.3, 20, low=100)]
    pieces, ended, _ = drawn(tables, 50_000)
    assert not ended
    assert [piece[:2] for piece in pieces] == list(itertools.islice(by_the_rule(tables), len(pieces)))
    assert 50_000 - 200 < sum(length for *_, length in pieces) <= 50_000


@pytest.mark.parametrize("rooms", [[7] * 50, [1000] * 20, [3000, 1, 9000]])
def test_going_on_from_any_place_gives_the_same_stream(rooms):
    tables = [table("a", 2.0, 50, high=400, domain="text"), table("bc", 1.0, 70, high=30), table("def", 0.3, 20)]
    whole, _, _ = drawn(tables, 12_000)
    places, walked = None, []
    for room in rooms:
        pieces, _, places = drawn(tables, max(room, SEQ_LENGTH), places)
        walked += pieces
    shortest = min(len(walked), len(whole))
    assert walked[:shortest] == whole[:shortest]
    assert shortest > 100


def test_shares_follow_the_weights_within_a_sample():
    tables = [table("short", 3.0, 400, low=5, high=30), table("long", 1.0, 50, low=100, high=200)]
    pieces, _, places = drawn(tables, 200_000)
    tokens = [sum(length for source, *_, length in pieces if source == wanted) for wanted in (0, 1)]
    assert [place.tokens for place in places] == tokens
    assert abs(tokens[0] / 3 - tokens[1]) < 200  # the longest sample


def test_padding_takes_room_but_no_share():
    pieces, _, _ = drawn([Table("a", np.array([5]))], 100, multiple=8)
    assert len(pieces) == 12


def test_a_used_up_source_leaves_and_the_rest_goes_on():
    once, forever = table("a", 1.0, 50, epochs=1), table("bc", 1.0, 70)
    pieces, ended, places = drawn([once, forever], 30_000)
    assert not ended
    assert sorted(row for source, row, *_ in pieces if source == 0) == list(range(50))
    assert [piece[:2] for piece in pieces] == list(itertools.islice(by_the_rule([once, forever]), len(pieces)))
    assert places[0].drawn == 50


@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
def test_every_sample_comes_as_often_as_epochs_say(epochs):
    pieces, ended, _ = drawn([table("a", 1.0, 50, epochs=epochs), table("bc", 1.0, 30, epochs=1)], 10**6)
    assert ended
    counts = np.bincount([row for source, row, *_ in pieces if source == 0], minlength=50)
    assert counts.sum() == 50 * epochs
    assert {int(count) for count in counts} <= {int(np.floor(epochs)), int(np.ceil(epochs))}
    assert drawn([table("a", 1.0, 50, epochs=1)], 10**6, [Place(50)])[:2] == ([], True)


# --- samples longer than a sequence -----------------------------------------------------------------------------------


def test_worked_example_of_cuts():
    assert cut_between_blocks(10, [(3, 4)], 6) == [(0, 3), (3, 6), (9, 1)]
    assert cut_between_blocks(10, [(3, 7)], 6) == [(0, 3)]
    assert cut_between_blocks(10, [(0, 7)], 6) == []


def test_no_cut_goes_through_a_block_and_none_is_needless():
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
            # A piece that ends before it is full could not have had any longer end.
            if following is not None:
                assert all(end in inside for end in range(start + size + 1, start + seq_length + 1))


def test_text_is_split_whatever_the_rule():
    for rule in ("refuse", "truncate", "split"):
        pieces, *_ = drawn([Table("a", np.array([600]), domain="text")], 600, too_long=rule)
        assert pieces == [(0, 0, 0, 256), (0, 0, 256, 256), (0, 0, 512, 88)]


@pytest.mark.parametrize(
    ("rule", "domain", "blocks", "expected"),
    [
        ("refuse", "interleaved", [(2, 100)], [(0, 0)]),
        ("truncate", "interleaved", [(2, 100), (200, 100)], [(0, 200)]),
        ("truncate", "chat", [(2, 100)], [(0, 256)]),
        ("truncate", "video", [(2, 300)], [(0, 0)]),  # what fits has nothing to look at
        ("split", "interleaved", [(2, 100), (200, 100)], [(0, 200), (200, 256), (456, 144)]),
        ("split", "chat", [(2, 100)], [(0, 0)]),
        ("split", "video", [(0, 300)], [(0, 0)]),
        ("split", "interleaved", [(10, 100), (150, 300)], [(0, 0)]),
        ("truncate", "interleaved", [(10, 100), (150, 300)], [(0, 150)]),
    ],
)
def test_what_becomes_of_long_samples(rule, domain, blocks, expected):
    """(0, 0): set aside."""
    long = Table("a", np.array([600, 40]), domain=domain, images={0: blocks}, epochs=1)
    pieces, ended, places = drawn([long], 10_000, too_long=rule)
    assert [(start, length) for _, row, start, length in pieces if row == 0] == expected
    assert [length for _, row, _, length in pieces if row == 1] == [40]
    assert ended
    assert places[0].drawn == 2


def test_patches_go_with_their_blocks():
    long = Table("a", np.array([600]), domain="interleaved", images={0: [(2, 100), (300, 50)]}, epochs=1)
    pieces, _ = blend(streams(long, too_long="split"), [Place()], 10_000, 8)
    assert pieces.patches.tolist() == [400, 200, 0]


def test_a_source_in_which_nothing_fits():
    with pytest.raises(DataError, match=r"source 'one' has no sample that fits train\.seq_length 256 .*600 tokens"):
        streams(Table("one", np.array([600])))
    with pytest.raises(DataError, match=r"source 'one' has no samples: its rejected\.jsonl says why"):
        streams(Table("one", np.array([], dtype=np.int64)))
    with pytest.raises(DataError, match=r"no sample of source 'one' can be cut to train\.seq_length 256"):
        drawn([Table("one", np.array([600]), images={0: [(0, 300)]})], 1000, too_long="split")


def test_a_single_sample_that_fits_may_come_early_in_one_epoch_and_late_in_the_next():
    """Between the two lie up to twice as many as an epoch has, all of them set aside."""
    lengths = np.full(16, 1000)
    lengths[3] = 64
    made = streams(Table("a", lengths, 1.0), Table("b", np.full(50, 30), 50.0))
    places: tuple[Place, ...] = (Place(), Place())
    lone: list[int] = []
    for _ in range(60):
        pieces, _ = blend(made, places, 1000, 8)
        places = places_after(places, pieces)
        lone += pieces.length[pieces.source == 0].tolist()
    used = np.flatnonzero(lone)
    assert np.diff(used).max() > 16
    assert len(used) > 10


@pytest.mark.parametrize("rule", ["truncate", "split"])
def test_long_samples_are_cut_when_they_are_needed_and_not_before(rule, monkeypatch):
    """Of 10,000 documents of 600 tokens, each of which gives 256 or more, 2560 tokens need ten at most."""
    long = Table("a", np.full(10_000, 600), domain="interleaved")
    looked_at: list[int] = []

    def blocks(row: int) -> list[tuple[int, int]]:
        looked_at.append(row)
        return []

    monkeypatch.setattr(long, "blocks", blocks)
    pieces, *_ = drawn([long], 2560, too_long=rule)
    assert sum(length for *_, length in pieces) > 2560 - 256
    assert len(looked_at) < 40


def test_a_source_used_up_long_ago_holds_nobody_back():
    once, forever = table("a", 1.0, 50, epochs=1), table("bc", 1.0, 70)
    pieces, ended, _ = drawn([once, forever], 5000, [Place(50, 0, 5000), Place(10**10, 0, 10**12)])
    assert not ended
    assert 5000 - 200 < sum(length for *_, length in pieces) <= 5000
