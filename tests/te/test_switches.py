"""Ways to the experts with Transformer Engine's modules, as built: the same parameters, and who communicates."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoEFlexTokenDispatcher

from model.transformer_engine import TransformerEngineSpecProvider
from tests.model.deep_ep import deep_ep_over_gloo
from tests.te.fake_ranks import RANKS, Rank, built
from tests.te.test_specs import describe, held

TP2_EP2 = Rank(1, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2})


@pytest.mark.parametrize(
    ("options", "dispatcher"),
    [
        ({"shared_expert_overlap": True}, MoEAlltoAllTokenDispatcher),
        ({"dispatcher": "flex"}, MoEFlexTokenDispatcher),
    ],
)
def test_parameters_do_not_depend_on_the_way_to_the_experts(options: dict[str, Any], dispatcher: type) -> None:
    expected = held("tiny_moe", "ep2", TransformerEngineSpecProvider)
    with deep_ep_over_gloo(), built("tiny_moe", RANKS["ep2"], TransformerEngineSpecProvider(), **options) as model:
        assert describe(model) == expected
        layers = [layer.mlp for layer in model.language_model.decoder.layers if hasattr(layer.mlp, "router")]
        assert {type(layer.token_dispatcher) for layer in layers} == {dispatcher}


def test_overlapped_shared_expert_leaves_communication_to_the_dispatcher() -> None:
    """Under tensor parallelism the layers would gather and scatter the sequence themselves, and once more."""
    modes = []
    for overlap in (False, True):
        backend = TransformerEngineSpecProvider()
        with built("tiny_moe", TP2_EP2, backend, shared_expert_overlap=overlap) as model:
            shared = model.language_model.decoder.layers[1].mlp.shared_experts
            modes.append((shared.linear_fc1.parallel_mode, shared.linear_fc2.parallel_mode))
    assert modes == [("column", "row"), (None, None)]
