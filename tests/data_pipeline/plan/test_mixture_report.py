"""The reports of a plan against its sources, each used exactly once."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.plan.mixture_report import (
    DomainShare,
    SourceUse,
    mixture_table,
    planned_mixture,
    source_use,
    too_long_share,
)
from data_pipeline.plan.plan import Plan, PlanPosition
from tests.data_pipeline.source_files import COST, Table, table

pytestmark = pytest.mark.fast


def plan(sources: list[Table], batch: int = 4) -> Plan:
    return Plan(
        sources, seed=0, seq_length=256, segment_multiple=8, global_batch_size=batch, cost=COST, too_long="split"
    )


def test_mixture_of_one_epoch_is_the_content_of_the_sources():
    captions = table("captions", 1.0, 40, epochs=1)
    pages = Table(
        "pages", np.array([600, 700, 100]), epochs=1, domain="ocr", images={0: [(2, 100), (300, 50)], 1: [(0, 300)]}
    )
    books = Table("books", np.array([1000, 30]), epochs=1, domain="text")
    made = plan([captions, pages, books])
    packs = [pack for step, _ in made.steps(PlanPosition.start(3)) for pack in step]
    assert planned_mixture(made.sources, packs) == {
        "image_text": DomainShare(40, int(captions.lengths.sum()), int(captions.patches.sum())),
        "text": DomainShare(2, 1030),
        "ocr": DomainShare(2, 700, 600, too_long=1),
    }


def test_mixture_table_lists_every_domain():
    shares = {"text": DomainShare(1200, 30_000, 0, too_long=2), "ocr": DomainShare(7, 10_000, 400)}
    assert mixture_table(shares).splitlines() == [
        "domain  samples  too long  tokens  share  patches",
        "text      1,200         2  30,000  75.0%        0",
        "ocr           7         0  10,000  25.0%      400",
    ]
    assert too_long_share(shares) == pytest.approx(2 / 1209)
    assert too_long_share({}) == 0


def use_of(sources: list[Table], batch: int) -> list[SourceUse]:
    made = plan(sources, batch)
    steps, _ = made.window(PlanPosition.start(len(sources)))
    return source_use(sources, steps)


def test_source_smaller_than_a_step_is_reported_with_the_number_of_repeats():
    """A step of 128 packs of 256 tokens, filled to 98.85%: 31 segments of 8 tokens per pack, 3953 per step."""
    document = Table("document", np.array([8]))
    large = Table("large", np.full(40_000, 8))
    [alone] = use_of([document], batch=128)
    assert alone.samples == 1
    assert alone.repeats_per_step == alone.samples_per_step == pytest.approx(0.9885 * 128 * 256 / 8, abs=2)
    assert alone.is_repeated
    half, other = use_of([document, large], batch=128)
    assert half.repeats_per_step == pytest.approx(alone.repeats_per_step / 2, abs=2)
    assert (other.label, other.samples, other.is_repeated) == ("large", 40_000, False)


def test_repeats_count_only_samples_that_fit():
    """Of 20 samples one fits. It is the one that is repeated."""
    lengths = np.full(20, 1000)
    lengths[7] = 8
    [use] = use_of([Table("one", lengths, images={row: [(0, 900)] for row in range(20) if row != 7})], batch=128)
    assert use.repeats_per_step == use.samples_per_step > 3000


@pytest.mark.parametrize(("samples", "repeated"), [(40, False), (60, False), (10, True)])
def test_repeats_are_per_step_and_not_per_window(samples, repeated):
    """A window of 128 steps of one pack, each of about 31 samples, of which all come several times in the window."""
    [use] = use_of([Table("one", np.full(samples, 8))], batch=1)
    assert use.samples_per_step == pytest.approx(31.6, abs=0.5)
    assert use.is_repeated == repeated


def test_source_that_is_used_up_counts_what_it_had():
    small = Table("small", np.array([8]), epochs=3)
    use, _ = use_of([small, Table("large", np.full(40_000, 8))], batch=128)
    assert use == SourceUse("small", 1, 3.0, 3.0)
