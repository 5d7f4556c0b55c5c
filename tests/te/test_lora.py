"""Adapters beside Transformer Engine's linear layers are those beside the torch backend's, grouped experts included."""

from __future__ import annotations

from typing import Any

import pytest

from model.backend import Backend, TorchSpecProvider
from model.canonical_names import canonical_name
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.lora_layers import adapters_of, sharded_adapters
from model.transformer_engine import TransformerEngineSpecProvider
from tests.te.fake_ranks import LAYOUTS_OF, RANKS, built

MARKS = ("tensor_model_parallel", "sequence_parallel", "allreduce", "average_gradients_across_tp_domain")
LORA = LoraConfig(rank=4, targets=["all-linear"])
CASES = [(preset, rank) for preset in ("tiny_moe", "tiny_dense") for rank in LAYOUTS_OF[preset] if rank != "tp2_etp2"]
WITH_EXPERTS = LoraConfig(rank=4, targets=["all-linear", "experts.*"])


def held(preset: str, rank: str, backend: Backend) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return shapes and marks of the adapters by their names in the whole model, and what is written of them."""
    with built(preset, RANKS[rank], backend.with_separate_norms()) as model:
        add_adapters(model, WITH_EXPERTS if model.glmv_config.decoder.is_moe else LORA)
        trained = {name: factor for name, factor in model.named_parameters() if factor.requires_grad}
        assert len(trained) == sum(len(adapter.factors) for _, adapter in adapters_of(model))
        factors = {
            canonical_name(model, name): (tuple(factor.shape), [getattr(factor, mark, None) for mark in MARKS])
            for name, factor in trained.items()
        }
        shards: Any = sharded_adapters(model).values()
        written = {s.key: (s.global_shape, s.global_offset, s.local_shape, s.replica_id) for s in shards}
    return factors, written


@pytest.mark.parametrize(("preset", "rank"), CASES)
def test_adapters_are_the_same_with_both_backends(preset: str, rank: str) -> None:
    fused, plain = (held(preset, rank, backend()) for backend in (TransformerEngineSpecProvider, TorchSpecProvider))
    assert fused == plain
    assert len(fused[0]) == len(fused[1]) > 20
