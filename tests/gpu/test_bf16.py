"""Both backends in bfloat16 are as close to transformers in float32 as transformers in bfloat16 is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from data_pipeline.encoding.batch import Batch
from model.backend import Backend
from model.canonical_names import canonical_name
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.whole_model import build_whole_model
from tests.model.test_parity import PACK, first_two_segments_joined, logits, one_segment_off, sample
from tests.reference import (
    TestSample,
    forward_inputs,
    pack,
    reference_gradients,
    transformers_logits,
    transformers_loss,
)
from tests.te import tables

MARGIN = 2  # times transformers' own distance: roundings differ, and with them the experts of a few tokens
FAR = 3  # times MARGIN: the least distance of a wrong model


@pytest.fixture
def model(build: Callable[..., GlmvModel], backend: Backend) -> GlmvModel:
    return build(dtype=torch.bfloat16, backend=backend)


@dataclass(frozen=True)
class Reference:
    """Samples, the same as a pack, and the results of transformers in float32 and bfloat16."""

    samples: list[TestSample]
    batch: Batch
    expected: Tensor  # logits in float32 [useful tokens, vocabulary]
    rounded: nn.Module  # transformers' model in bfloat16
    rounding: float  # distance of its logits from the expected ones

    def distance(self, model: GlmvModel, batch: Batch | None = None) -> float:
        """Return the distance of this implementation's logits from the expected ones."""
        rows = logits(model.eval(), batch or self.batch)
        spans = zip(self.batch.cu_seqlens.tolist(), self.batch.segment_lengths.tolist(), strict=False)
        return distance(torch.cat([rows[begin : begin + length] for begin, length in spans]), self.expected)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@torch.no_grad()
def whole_logits(reference: nn.Module, samples: list[TestSample]) -> Tensor:
    return torch.cat([transformers_logits(reference, one) for one in samples]).float()


@pytest.fixture
def truth(model: GlmvModel, reference: nn.Module) -> Reference:
    samples = [sample(model, name) for name in PACK]
    rounded = copy.deepcopy(reference).bfloat16()
    expected = whole_logits(reference, samples)
    rounding = distance(whole_logits(rounded, samples), expected)
    return Reference(samples, pack(samples, seq_length=256), expected, rounded, rounding)


def test_logits_are_as_close_as_those_of_transformers(model: GlmvModel, truth: Reference) -> None:
    assert truth.distance(model) <= MARGIN * truth.rounding < 0.03


def test_every_gradient_is_as_close_as_that_of_transformers(
    model: GlmvModel, reference: nn.Module, truth: Reference
) -> None:
    for name, (found, allowed) in gradient_distances(model, reference, truth).items():
        assert found <= allowed, name


def gradient_distances(model: GlmvModel, reference: nn.Module, truth: Reference) -> dict[str, tuple[float, float]]:
    """Return the distance of every gradient from the expected one, and the largest distance allowed."""
    for each in (reference, truth.rounded):
        transformers_loss(each, truth.samples).backward()
    batch = truth.batch
    losses = model.train()(**forward_inputs(batch), labels=batch.labels)
    ((losses.cpu() * batch.loss_mask).sum() / batch.loss_mask.sum()).backward()

    found = {canonical_name(model, name): p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    expected, rounded = reference_gradients(reference), reference_gradients(truth.rounded)
    assert found.keys() == expected.keys()
    # An expert has few tokens. One token routed elsewhere changes its gradient much, so compare a layer's experts
    # together.
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(re.sub(r"local_experts\.\d+", "experts", name), []).append(name)
    distances = {}
    for group, names in groups.items():
        got, hf, want = (torch.cat([of[n].flatten().float() for n in names]) for of in (found, rounded, expected))
        rounding_of_one = 2**-8
        distances[group] = (distance(got, want), MARGIN * max(distance(hf, want), rounding_of_one))
    return distances


@pytest.mark.parametrize("broken", [one_segment_off, first_two_segments_joined], ids=lambda f: f.__name__)
def test_wrong_segments_are_far_from_the_reference(model: GlmvModel, truth: Reference, broken: Any) -> None:
    assert truth.distance(model, broken(truth.batch)) >= FAR * MARGIN * truth.rounding


@pytest.mark.parametrize(
    ("part", "mask"), [("language_model", AttnMaskType.no_mask), ("vision_model", AttnMaskType.causal)]
)
def test_wrong_mask_is_far_from_the_reference(
    model: GlmvModel, reference: nn.Module, truth: Reference, part: str, mask: AttnMaskType
) -> None:
    for module in model.get_submodule(part).modules():
        if hasattr(module, "attn_mask_type"):
            module.attn_mask_type = mask
    distances = gradient_distances(model, reference, truth)
    furthest = max(found / allowed for name, (found, allowed) in distances.items() if name.startswith(part))
    assert furthest >= FAR


@pytest.mark.parametrize("backend_name", ["transformer_engine"], indirect=True)
@pytest.mark.parametrize("preset", ["tiny_moe", "tiny_dense"])
def test_modules_equal_the_golden_tables(single_process: None, backend: Backend, preset: str) -> None:
    """The tables were written without the compiled part of Transformer Engine."""
    model = build_whole_model(GlmvConfig.from_preset(preset), dtype=torch.bfloat16, backend=backend)
    assert tables.folded(list(tables.rows(model, tables.shards(model)))) == tables.read(f"{preset}_one")
