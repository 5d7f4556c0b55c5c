"""The plan on made-up sources: nothing is read, so that what it promises can be checked over many epochs."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.plan import Pack, Plan, Position

pytestmark = pytest.mark.fast


@dataclass
class Table:
    label: str
    weight: float
    lengths: np.ndarray
    is_text: np.ndarray


def table(label: str, weight: float, samples: int, *, low: int = 5, high: int = 200) -> Table:
    rng = np.random.default_rng(len(label) + samples)
    return Table(label, weight, rng.integers(low, high, samples), np.zeros(samples, dtype=bool))


def plan(sources: list[Table], *, seed: int = 0, seq_length: int = 256, batch: int = 4, multiple: int = 8) -> Plan:
    options = {"seq_length": seq_length, "segment_multiple": multiple, "global_batch_size": batch}
    return Plan(sources, seed=seed, **options)


def take(made: Plan, steps: int, position: Position | None = None) -> list[tuple[list[Pack], Position]]:
    return list(itertools.islice(made.steps(position or Position.start(len(made.sources))), steps))


def test_every_sample_comes_once_an_epoch_in_a_new_order():
    source = table("one", 1.0, 100)
    made = plan([source])
    packs = (pack for step, _ in made.steps(Position.start(1)) for pack in step)
    rows = [piece.row for pack in itertools.islice(packs, 400) for piece in pack.pieces]
    window = made.window(Position.start(1))[1].drawn[0]
    counts = Counter(rows[:window])
    assert max(counts.values()) - min(counts[row] for row in range(100)) <= 1

    epochs = [[made._row(0, number) for number in range(start, start + 100)] for start in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_plan_is_a_pure_function_of_its_arguments():
    sources = [table("one", 2.0, 50), table("three", 1.0, 70)]
    assert take(plan(sources), 30) == take(plan(sources), 30)
    assert take(plan(sources), 30) != take(plan(sources, seed=1), 30)


def test_going_on_at_any_step_gives_the_same_packs():
    sources = [table("one", 2.0, 50), table("three", 1.0, 70)]
    steps = take(plan(sources), 60)
    for number in range(59):
        assert take(plan(sources), 2, steps[number][1])[0] == steps[number + 1]


def test_every_step_has_its_packs_and_every_pack_fits():
    made = plan([table("one", 2.0, 50), table("three", 1.0, 70)])
    for step, _ in take(made, 60):
        assert len(step) == 4
        for pack in step:
            assert 0 < sum(-(-piece.length // 8) * 8 for piece in pack.pieces) <= 256


def test_sources_are_blended_by_tokens():
    """Shares follow the weights although one source's samples are eight times as long."""
    sources = [table("short", 3.0, 400, low=5, high=30), table("long", 1.0, 50, low=100, high=200)]
    tokens = [0, 0]
    for step, _ in take(plan(sources), 200):
        for pack in step:
            for piece in pack.pieces:
                tokens[piece.source] += piece.length
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)


def test_a_new_source_leaves_the_order_of_the_others_alone():
    one, two = table("one", 1.0, 50), table("two", 1.0, 50)
    alone, second = plan([one]), plan([two, one])
    assert [alone._row(0, number) for number in range(120)] == [second._row(1, number) for number in range(120)]


def test_long_texts_are_cut_and_long_image_samples_set_aside():
    source = Table("one", 1.0, np.array([600, 700, 40]), np.array([True, False, False]))
    packs, _ = plan([source]).window(Position.start(1))
    pieces = [piece for pack in packs for piece in pack.pieces]
    text = {(piece.start, piece.length) for piece in pieces if piece.row == 0}
    assert text == {(0, 256), (256, 256), (512, 88)}
    assert {piece.row for piece in pieces} == {0, 2}
    assert {piece.row for pack in packs for piece in pack.too_long} == {1}


def test_a_source_in_which_nothing_fits():
    with pytest.raises(DataError, match=r"source 'one' has no sample that fits train\.seq_length 256"):
        plan([Table("one", 1.0, np.array([600]), np.array([False]))])
    with pytest.raises(DataError, match="source 'one' has no sample that fits"):
        plan([Table("one", 1.0, np.array([], dtype=np.int64), np.array([], dtype=bool))])


def test_seq_length_must_hold_whole_segments():
    with pytest.raises(
        DataError, match=r"train\.seq_length 250 is not a multiple of data\.segment_multiple 8: use 256"
    ):
        plan([table("one", 1.0, 5)], seq_length=250)
