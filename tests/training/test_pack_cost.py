"""The data pipeline's cost of a pack equals that of the model's cost model."""

from __future__ import annotations

import pytest

from model.config import GlmvConfig
from model.flops import FORWARD_AND_BACKWARD
from model.pipeline_layout import unit_costs
from training.pack_cost import pack_cost

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("preset", ["glm45v", "glm41v_9b", "tiny_moe"])
def test_cost_of_a_pack_equals_the_cost_of_all_units_of_the_model(preset: str) -> None:
    model = GlmvConfig.from_preset(preset)
    lengths, images = [3000, 17, 5000], [[4096, 1024], [], [64, 64, 900]]
    costs = unit_costs(model, lengths, [patches for of_one in images for patches in of_one])
    whole = costs.first + sum(costs.layers) + costs.last
    squares = [sum(n * n for n in of_one) for of_one in images]
    of = pack_cost(model).of(lengths, [sum(of_one) for of_one in images], squares)
    assert of.sum() * FORWARD_AND_BACKWARD == pytest.approx(whole, rel=1e-12)
