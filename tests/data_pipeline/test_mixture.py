"""The report of a plan against its sources, each seen exactly once."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.mixture import Share, planned_mixture
from data_pipeline.plan import Plan
from tests.data_pipeline.sources import COST, Table, table

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
    assert planned_mixture(plan, 1000) == {
        "image_text": Share(40, int(captions.lengths.sum()), int(captions.patches.sum())),
        "text": Share(2, 1030),
        "ocr": Share(2, 700, 600, set_aside=1),
    }
