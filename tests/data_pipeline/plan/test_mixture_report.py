"""The report of a plan against its sources, each seen exactly once."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.plan.mixture_report import Share, mixture_table, planned_mixture, set_aside_share
from data_pipeline.plan.plan import Plan, Position
from tests.data_pipeline.source_files import COST, Table, table

pytestmark = pytest.mark.fast


def test_one_epoch_of_everything():
    captions = table("captions", 1.0, 40, epochs=1)
    pages = Table(
        "pages", np.array([600, 700, 100]), epochs=1, domain="ocr", images={0: [(2, 100), (300, 50)], 1: [(0, 300)]}
    )
    books = Table("books", np.array([1000, 30]), epochs=1, domain="text")
    plan = Plan(
        [captions, pages, books],
        seed=0,
        seq_length=256,
        segment_multiple=8,
        global_batch_size=4,
        cost=COST,
        too_long="split",
    )
    packs = [pack for step, _ in plan.steps(Position.start(3)) for pack in step]
    assert planned_mixture(plan.sources, packs) == {
        "image_text": Share(40, int(captions.lengths.sum()), int(captions.patches.sum())),
        "text": Share(2, 1030),
        "ocr": Share(2, 700, 600, set_aside=1),
    }


def test_the_table():
    shares = {"text": Share(1200, 30_000, 0, set_aside=2), "ocr": Share(7, 10_000, 400)}
    assert mixture_table(shares).splitlines() == [
        "domain  samples  set aside  tokens  share  patches",
        "text      1,200          2  30,000  75.0%        0",
        "ocr           7          0  10,000  25.0%      400",
    ]
    assert set_aside_share(shares) == pytest.approx(2 / 1209)
    assert set_aside_share({}) == 0
