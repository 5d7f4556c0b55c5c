"""The Transformer Engine backend's modules as built: names, shapes, how they are split, and keys in checkpoints.

The golden tables are reviewed by hand (see tables.py); the other tests compare with the torch backend and the table
of weights.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import astuple, dataclass
from functools import cache

import pytest
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules

import model.decoder as model_decoder
from model.backend import Backend, TorchSpecProvider
from model.canonical_names import canonical_name
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.transformer_engine import TransformerEngineSpecProvider
from model.weights.load import local_tensors
from model.weights.table import weights
from tests.te import tables
from tests.te.fake_ranks import CASES, RANKS, built

WHOLE = [preset for preset, rank in CASES if rank == "one"]


@dataclass(frozen=True)
class Held:
    """What a rank holds of a model."""

    table: list[tables.Row]
    written: Counter[tuple[object, ...]]  # what it declares for a checkpoint: key, whole shape, which part, replica
    marks: dict[str, tuple[str, bool, str]]  # shape, whether split, and marks for gradient reduction, by canonical name
    names: Counter[str]  # canonical names of parameters and expert biases


@cache
def held(preset: str, rank: str, backend: type[Backend]) -> Held:
    with built(preset, RANKS[rank], backend()) as model:
        return describe(model)


def describe(model: GlmvModel) -> Held:
    shards = tables.shards(model)
    rows = list(tables.rows(model, shards))
    return Held(
        table=tables.folded(rows),
        written=Counter(
            (part.key, part.global_shape, part.global_offset, part.local_shape, part.replica_id, part.dtype)
            for parts in shards.values()
            for part in parts
        ),
        marks={canonical_name(model, row.parameter): (row.shape, bool(row.split), row.marks) for row in rows},
        names=Counter(name for name, _ in local_tensors(model)),
    )


HEADINGS = ("--", "++", "@@")


def difference(found: Held, golden: str) -> list[str]:
    """Return the rows in which a model differs from a golden table, as diff shows them."""
    expected, rows = ([",".join(astuple(row)) for row in table] for table in (tables.read(golden), found.table))
    return [line for line in difflib.unified_diff(expected, rows, n=0, lineterm="") if line[:2] not in HEADINGS]


@pytest.mark.parametrize(("preset", "rank"), CASES)
def test_names_shapes_and_keys_equal_the_golden_table(preset: str, rank: str) -> None:
    assert not difference(held(preset, rank, TransformerEngineSpecProvider), f"{preset}_{rank}")


@pytest.mark.parametrize(("preset", "rank"), CASES)
def test_both_backends_are_the_same_to_checkpoints_and_optimizer(preset: str, rank: str) -> None:
    fused, plain = (held(preset, rank, backend) for backend in (TransformerEngineSpecProvider, TorchSpecProvider))
    assert fused.written == plain.written
    assert fused.marks == plain.marks


@pytest.mark.parametrize("preset", WHOLE)
def test_every_parameter_has_one_row_in_the_table_of_weights(preset: str) -> None:
    config = GlmvConfig.from_preset(preset)
    assert held(preset, "one", TransformerEngineSpecProvider).names == Counter(w.name for w in weights(config))


@pytest.mark.parametrize("rank", ["tp2", "ep2"])
def test_one_rank_of_two_holds_names_of_the_table_of_weights(rank: str) -> None:
    """With EP2, its experts are the second half."""
    names = held("tiny_moe", rank, TransformerEngineSpecProvider).names
    table = [weight.name for weight in weights(GlmvConfig.from_preset("tiny_moe"))]
    assert names == Counter(name for name in table if rank == "tp2" or not re.search(r"\.local_experts\.[0-3]\.", name))


# --- wrong specs ------------------------------------------------------------------------------------------------------


class Unfused(TransformerEngineSpecProvider):
    """Norms are separate modules."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        return None


class NoNorm(TransformerEngineSpecProvider):
    """Norms are neither separate modules nor part of a linear layer."""

    def column_parallel_layer_norm_linear(self) -> type:
        return self.column_parallel_linear()


class NormTwice(TransformerEngineSpecProvider):
    """Norms are both."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False


class ExpertsSwapped(TransformerEngineSpecProvider):
    """The splits of the experts' first and second matrix are exchanged."""

    def grouped_mlp_modules(self, *arguments: bool) -> tuple[type, MLPSubmodules]:
        experts, submodules = super().grouped_mlp_modules(*arguments)
        return experts, MLPSubmodules(linear_fc1=submodules.linear_fc2, linear_fc2=submodules.linear_fc1)


class ExpertsOneByOne(TransformerEngineSpecProvider):
    """Experts are not grouped in one matrix product."""

    def grouped_mlp_modules(self, *_: bool) -> tuple[type, MLPSubmodules]:
        return super().grouped_mlp_modules(False, False)


@pytest.mark.parametrize("wrong", [Unfused, NoNorm, NormTwice, ExpertsSwapped, ExpertsOneByOne])
def test_wrong_spec_differs_from_the_golden_table(wrong: type[TransformerEngineSpecProvider]) -> None:
    with built("tiny_moe", RANKS["tp2"], wrong()) as model:
        assert difference(describe(model), "tiny_moe_tp2")


def test_without_the_map_of_keys_no_norm_would_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense first decoder layer and the vision blocks have two fused norms each, layers with experts one."""
    written = {key for key, *_ in held("tiny_moe", "one", TorchSpecProvider).written}
    monkeypatch.setattr(model_decoder, "FUSED_NORMS", {})
    with built("tiny_moe", RANKS["one"], TransformerEngineSpecProvider()) as model:
        without_map = describe(model)
    assert difference(without_map, "tiny_moe_one")
    assert len({key for key, *_ in without_map.written} - written) == 2 + 3 + 2  # vision blocks share keys


def test_norm_before_experts_is_a_separate_module() -> None:
    """Router, routed experts and shared experts all read its output."""
    with built("tiny_moe", RANKS["one"], TransformerEngineSpecProvider()) as model:
        dense, *moe = model.language_model.decoder.layers
    assert isinstance(dense.pre_mlp_layernorm, IdentityOp)
    assert not any(isinstance(layer.pre_mlp_layernorm, IdentityOp) for layer in moe)
    assert all(isinstance(layer.input_layernorm, IdentityOp) for layer in (dense, *moe))
