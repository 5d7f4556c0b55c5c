"""The plan on synthetic sources: nothing is read, so its promises can be checked over many epochs."""

from __future__ import annotations

import gc
import itertools
import json
import resource
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from benchmarks.packing import imbalance, make_sources, planned, reweighted
from data_pipeline.errors import DataError
from data_pipeline.plan.blend import StreamPosition
from data_pipeline.plan.pack_cost import PackCost
from data_pipeline.plan.plan import MIN_WINDOW_PACKS, Pack, Piece, Plan, PlanPosition
from tests.data_pipeline.source_files import COST, Table, table

BATCH, SEQ_LENGTH = 32, 256
WINDOW = MIN_WINDOW_PACKS // BATCH  # steps


def plan(sources: list[Table], *, seed: int = 0, batch: int = BATCH, seq_length: int = SEQ_LENGTH, **options) -> Plan:
    options = {"segment_multiple": 8, "cost": COST, "too_long": "refuse", **options}
    return Plan(sources, seed=seed, seq_length=seq_length, global_batch_size=batch, **options)


def mixture(**options) -> list[Table]:
    return [
        table("one", 2.0, 50, **options),
        table("three", 1.0, 70, **options),
        table("book", 0.5, 9, low=100, high=2000, domain="text", **options),
    ]


def take(made: Plan, steps: int | None, position: PlanPosition | None = None) -> list[tuple[list[Pack], PlanPosition]]:
    return list(itertools.islice(made.steps(position or PlanPosition.start(len(made.sources))), steps))


def pieces_of(steps: list[tuple[list[Pack], PlanPosition]]) -> list[Piece]:
    return [piece for step, _ in steps for pack in step for piece in pack.pieces]


@pytest.mark.fast
def test_plan_is_a_pure_function_of_its_arguments():
    steps = take(plan(mixture()), 10)
    assert steps == take(plan(mixture()), 10)
    assert steps != take(plan(mixture(), seed=1), 10)


@pytest.mark.fast
def test_resuming_at_any_step_gives_the_same_packs():
    steps = take(plan(mixture()), 5 * WINDOW)
    for number in range(len(steps) - 2):
        position = PlanPosition.from_state_dict(json.loads(json.dumps(steps[number][1].state_dict())))
        assert take(plan(mixture()), 2, position) == steps[number + 1 : number + 3]


def test_every_pack_fits_and_epochs_follow_each_other():
    """Every sample comes once, with all of its tokens, before any comes again."""
    made = plan(mixture())
    steps = take(made, 20 * WINDOW)
    for step, _ in steps:
        assert len(step) == BATCH
        for pack in step:
            assert 0 < _filled(pack) <= SEQ_LENGTH
    for number, source in enumerate(made.sources):
        tokens = np.zeros(len(source.lengths), np.int64)
        starts: set[tuple[int, int, int]] = set()
        for piece in pieces_of(steps):
            if piece.source == number:
                tokens[piece.row] += piece.length
                starts.add((piece.row, piece.start, piece.length))
        # A row is cut into the same pieces in every epoch, and they cover it.
        assert (
            sum(length for *_, length in starts) == source.lengths[[row for row, start, _ in starts if not start]].sum()
        )
        epochs = tokens // source.lengths
        assert epochs.max() - epochs.min() <= 1
        assert steps[-1][1].streams[number].tokens == tokens.sum()


@pytest.mark.fast
@pytest.mark.parametrize("batch", [4, 32, 200, 1000])
def test_one_epoch_has_every_token_once_and_then_the_steps_end(batch):
    sources = mixture(epochs=1)
    steps = take(plan(sources, batch=batch), None)
    assert all(len(step) == batch for step, _ in steps)
    assert all(_filled(pack) <= SEQ_LENGTH for step, _ in steps for pack in step)
    found = Counter((piece.source, piece.row, token) for piece in pieces_of(steps) for token in _tokens(piece))
    expected = [
        (s, row, token)
        for s, source in enumerate(sources)
        for row, n in enumerate(source.lengths)
        for token in range(n)
    ]
    assert set(found.values()) == {1}
    assert sorted(found) == expected
    assert take(plan(sources, batch=batch), None, steps[-1][1]) == []


def _filled(pack: Pack) -> int:
    return sum(-(-piece.length // 8) * 8 for piece in pack.pieces)


def _tokens(piece: Piece) -> range:
    return range(piece.start, piece.start + piece.length)


def any_source(rng: np.random.Generator, label: str, seq_length: int) -> Table:
    """Make samples of up to ten sequences, with images anywhere in those that are not text."""
    lengths = rng.integers(1, int(rng.choice([0.6, 1, 3, 10]) * seq_length) + 2, rng.integers(1, 60))
    domain = str(rng.choice(["text", "interleaved", "chat", "ocr"]))
    images: dict[int, list[tuple[int, int]]] = {}
    for row, length in enumerate(lengths.tolist() if domain != "text" else []):
        end, blocks = 0, []
        while rng.random() < 0.8:
            start, size = end + int(rng.integers(0, 4)), int(rng.integers(1, max(2, length // 2)))
            end = start + size
            if end > length:
                break
            blocks.append((start, size))
        images[row] = blocks
    epochs, weight = float(rng.choice([1, 2])), float(rng.choice([0.01, 1, 3]))
    return Table(label, lengths, weight, epochs, domain, images, shard_size=int(rng.integers(1, 20)))


def test_no_mixture_loses_samples_cuts_images_or_overfills_packs():
    planned_cases = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        multiple = int(rng.choice([1, 8, 16]))
        seq_length, batch = multiple * int(rng.integers(2, 80)), int(rng.choice([1, 2, 5, 16, 64, 130, 300]))
        sources = [any_source(rng, f"source {number}", seq_length) for number in range(rng.integers(1, 4))]
        options = {"segment_multiple": multiple, "too_long": str(rng.choice(["refuse", "truncate", "split"]))}
        try:
            steps = take(plan(sources, seed=seed, batch=batch, seq_length=seq_length, **options), None)
        except DataError:  # a source in which nothing fits
            continue
        planned_cases += 1
        packs = [pack for step, _ in steps for pack in step]
        assert all(
            sum(-(-piece.length // multiple) * multiple for piece in pack.pieces) <= seq_length for pack in packs
        )
        too_long = Counter((piece.source, piece.row) for pack in packs for piece in pack.too_long)
        seen: dict[tuple[int, int], Counter[Piece]] = {}
        for piece in pieces_of(steps):
            seen.setdefault((piece.source, piece.row), Counter())[piece] += 1
            for start, size in sources[piece.source].blocks(piece.row):
                assert not start < piece.start < start + size
                assert not start < piece.start + piece.length < start + size
        for number, source in enumerate(sources):
            for row, length in enumerate(source.lengths.tolist()):
                pieces = seen.get((number, row), Counter())
                assert set(pieces.values()) <= {source.epochs}
                assert too_long[number, row] == (0 if pieces else source.epochs)
                if source.is_text[row] or length <= seq_length:
                    assert sum(piece.length for piece in pieces) == length
        middle = int(rng.integers(len(steps)))
        again = plan(sources, seed=seed, batch=batch, seq_length=seq_length, **options)
        assert take(again, None, steps[middle][1]) == steps[middle + 1 :]
    assert planned_cases > 300


@pytest.mark.fast
def test_ranks_of_any_number_share_one_step():
    """Rank r of n takes packs r, r + n ...: micro-step by micro-step, the ranks together take the step in order."""
    (step, _), *_ = take(plan(mixture()), 1)
    for ranks in (1, 2, 4, 8, 32):
        shares = [step[rank::ranks] for rank in range(ranks)]
        assert [pack for micro_step in zip(*shares, strict=True) for pack in micro_step] == step


@pytest.mark.fast
def test_sources_are_blended_by_tokens():
    """Shares follow the weights to within one sample, although one source's samples are eight times as long."""
    sources = [table("short", 3.0, 400, low=5, high=30), table("long", 1.0, 50, low=100, high=200)]
    tokens: Counter[int] = Counter()
    for step, position in take(plan(sources), 10 * WINDOW):
        for pack in step:
            for piece in pack.pieces:
                tokens[piece.source] += piece.length
        if not position.steps:  # at the end of a window
            assert abs(tokens[0] / 3 - tokens[1]) < 200


@pytest.mark.fast
def test_long_texts_span_windows_and_long_image_samples_are_too_long():
    """The book takes 300 packs, more than a window holds."""
    length = 300 * SEQ_LENGTH + 88
    source = Table("one", np.array([length]), domain="text", epochs=1)
    images = Table("two", np.array([700, 40]), weight=0.01, epochs=1)
    steps = take(plan([source, images], batch=MIN_WINDOW_PACKS), None)
    assert len(steps) == 3
    book = sorted(piece for piece in pieces_of(steps) if piece.source == 0)
    assert [piece.start for piece in book] == list(range(0, length, SEQ_LENGTH))
    assert sum(piece.length for piece in book) == length
    assert steps[0][1].streams[0].pieces > 0
    too_long = [piece for step, _ in steps for pack in step for piece in pack.too_long]
    assert too_long == [Piece(1, 0, 0, 700)]


@pytest.mark.fast
def test_step_of_samples_of_five_eighths_has_one_sample_per_pack():
    """Two of them do not fit one pack: a step takes no more samples than it has packs."""
    steps = take(plan([Table("one", np.full(40, 160))]), 3 * WINDOW)
    assert all(len(pack.pieces) == 1 for step, _ in steps for pack in step)
    assert steps[-1][1].streams == (StreamPosition(3 * WINDOW * BATCH, 0, 3 * WINDOW * BATCH * 160),)


@pytest.mark.fast
def test_two_samples_of_a_little_more_than_half_a_pack_never_share_one():
    steps = take(plan([Table("one", np.array([4104, 7200] * 20))], seq_length=8192), 2 * WINDOW)
    assert {len(pack.pieces) for step, _ in steps for pack in step} == {1}


@pytest.mark.fast
def test_fewer_samples_than_packs_get_a_pack_each():
    """The other packs of the step are empty."""
    (step, _), *more = take(plan([Table("one", np.full(40, 150), epochs=1)], batch=640), None)
    assert not more
    assert sorted(len(pack.pieces) for pack in step) == [0] * 600 + [1] * 40


@pytest.mark.fast
def test_other_costs_make_a_different_plan_and_fingerprint():
    other = PackCost(token=1, token_squared=1000)
    assert take(plan(mixture()), 3) != take(plan(mixture(), cost=other), 3)
    assert COST.fingerprint != other.fingerprint
    assert COST.fingerprint == PackCost(100, 1, 20, 0).fingerprint
    assert len(COST.fingerprint) == 8


@pytest.mark.fast
def test_seq_length_that_is_no_multiple_of_the_segments_is_refused():
    with pytest.raises(
        DataError, match=r"train\.seq_length 250 is not a multiple of data\.segment_multiple 8: use 256"
    ):
        plan([table("one", 1.0, 5)], seq_length=250)


GLM_45V = PackCost(token=25_604_653_056, token_squared=1_130_496, patch=1_450_778_624, patch_squared=147_456)


@pytest.fixture(scope="module")
def real_lengths():
    """A tenth of the benchmark's samples."""
    return make_sources(6000)


@pytest.mark.parametrize(("seq_length", "cost", "patches"), [(8192, 1.025, 1.10), (32768, 1.03, 1.04)])
def test_packs_of_a_realistic_mixture_are_full_and_balanced(real_lengths, seq_length, cost, patches):
    """1,024 packs per step on 64 ranks: a micro-step waits for its costliest pack no longer than this."""
    of = planned(reweighted(real_lengths, seq_length), seq_length, 1024, 3, GLM_45V)
    assert of.length.sum() / (3 * 1024 * seq_length) > 0.985
    assert imbalance(of.step, of.pack, of.cost, 1024, 64).mean() < cost
    assert imbalance(of.step, of.pack, of.patches, 1024, 64).mean() < patches
    # Every step gets its share of costly packs.
    costs = np.bincount(of.step, of.cost)
    assert costs.max() / costs.min() < 1.02


@pytest.mark.parametrize("ranks", [8, 16, 32])
def test_micro_steps_are_balanced_on_fewer_ranks(real_lengths, ranks):
    of = planned(reweighted(real_lengths, 8192), 8192, 1024, 1, GLM_45V)
    assert imbalance(of.step, of.pack, of.cost, 1024, ranks).mean() < 1.02
    assert imbalance(of.step, of.pack, of.patches, 1024, ranks).mean() < 1.08


def test_million_samples_cost_no_time_at_the_start():
    lengths = np.random.default_rng(0).integers(50, 3000, 1_000_000).astype(np.int32)
    source = Table("one", lengths[:10])
    source.lengths, source.is_text = lengths, np.zeros(len(lengths), bool)
    source.patches, source.patches_squared = lengths // 2, lengths.astype(np.int64) ** 2
    source.shard_rows = np.arange(0, 1_000_001, 100)
    begin = time.process_time()
    made = plan([source], seq_length=8192, batch=256)
    step, _ = next(made.steps(PlanPosition((StreamPosition(123_456_789, 0, 10**12),))))
    assert len(step) == 256
    assert time.process_time() - begin < 0.5


def test_memory_does_not_grow():
    """1,200 steps in 38 windows, over many epochs."""
    stream = plan(mixture(), batch=4).steps(PlanPosition.start(3))
    tracemalloc.start()
    try:
        held = []
        for _ in range(3):
            for _ in itertools.islice(stream, 400):
                pass
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[0] < 50_000


@pytest.mark.slow
def test_memory_does_not_grow_in_100_000_steps():
    stream = plan(mixture(), batch=4).steps(PlanPosition.start(3))
    for _ in itertools.islice(stream, 2000):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in itertools.islice(stream, 100_000):
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # kB
