"""Both backends in bfloat16 are no further from transformers in float32 than transformers in bfloat16 is."""

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
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.hf_weights import canonical_name
from model.parallel import ParallelConfig
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

MARGIN = 2  # over transformers' own distance: roundings differ, and with them a few tokens' experts
FAR = 3  # times MARGIN: what is wrong is at least so much further


@pytest.fixture
def model(build: Callable[..., GlmvModel], backend: Backend) -> GlmvModel:
    return build(dtype=torch.bfloat16, backend=backend)


@dataclass(frozen=True)
class Truth:
    """The same samples as a pack and alone, and what transformers makes of them in float32 and in bfloat16."""

    samples: list[TestSample]
    batch: Batch
    expected: Tensor  # [useful tokens, vocabulary]
    rounded: nn.Module
    rounding: float  # its logits' distance from the expected

    def distance(self, model: GlmvModel, batch: Batch | None = None) -> float:
        """Of our logits from the expected."""
        rows = logits(model.eval(), batch or self.batch)
        spans = zip(self.batch.cu_seqlens.tolist(), self.batch.segment_lengths.tolist(), strict=False)
        return distance(torch.cat([rows[begin : begin + length] for begin, length in spans]), self.expected)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@torch.no_grad()
def whole_logits(reference: nn.Module, samples: list[TestSample]) -> Tensor:
    return torch.cat([transformers_logits(reference, one) for one in samples]).float()


@pytest.fixture
def truth(model: GlmvModel, reference: nn.Module) -> Truth:
    samples = [sample(model, name) for name in PACK]
    rounded = copy.deepcopy(reference).bfloat16()
    expected = whole_logits(reference, samples)
    rounding = distance(whole_logits(rounded, samples), expected)
    return Truth(samples, pack(samples, seq_length=256), expected, rounded, rounding)


def test_logits(model: GlmvModel, truth: Truth) -> None:
    assert truth.distance(model) <= MARGIN * truth.rounding < 0.03


def test_every_gradient(model: GlmvModel, reference: nn.Module, truth: Truth) -> None:
    for name, (ours, allowed) in gradient_distances(model, reference, truth).items():
        assert ours <= allowed, name


def gradient_distances(model: GlmvModel, reference: nn.Module, truth: Truth) -> dict[str, tuple[float, float]]:
    """Of every gradient of ours from the expected, and how far it may be."""
    for each in (reference, truth.rounded):
        transformers_loss(each, truth.samples).backward()
    batch = truth.batch
    losses = model.train()(**forward_inputs(batch), labels=batch.labels)
    ((losses.cpu() * batch.loss_mask).sum() / batch.loss_mask.sum()).backward()

    ours = {canonical_name(model, name): p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    expected, rounded = reference_gradients(reference), reference_gradients(truth.rounded)
    assert ours.keys() == expected.keys()
    # An expert has few tokens, and one that goes to another is much of its gradient: a layer's are taken together.
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(re.sub(r"local_experts\.\d+", "experts", name), []).append(name)
    distances = {}
    for group, names in groups.items():
        mine, theirs, true = (torch.cat([of[n].flatten().float() for n in names]) for of in (ours, rounded, expected))
        one_number = 2**-8  # the rounding of one
        distances[group] = (distance(mine, true), MARGIN * max(distance(theirs, true), one_number))
    return distances


@pytest.mark.parametrize("broken", [one_segment_off, first_two_segments_joined], ids=lambda f: f.__name__)
def test_wrong_segments_are_far_off(model: GlmvModel, truth: Truth, broken: Any) -> None:
    assert truth.distance(model, broken(truth.batch)) >= FAR * MARGIN * truth.rounding


@pytest.mark.parametrize(
    ("part", "mask"), [("language_model", AttnMaskType.no_mask), ("vision_model", AttnMaskType.causal)]
)
def test_a_wrong_mask_is_far_off(
    model: GlmvModel, reference: nn.Module, truth: Truth, part: str, mask: AttnMaskType
) -> None:
    for module in model.get_submodule(part).modules():
        if hasattr(module, "attn_mask_type"):
            module.attn_mask_type = mask
    distances = gradient_distances(model, reference, truth)
    furthest = max(ours / allowed for name, (ours, allowed) in distances.items() if name.startswith(part))
    assert furthest >= FAR


@pytest.mark.parametrize("backend_name", ["transformer_engine"], indirect=True)
@pytest.mark.parametrize("preset", ["tiny_moe", "tiny_dense"])
def test_modules_are_those_of_the_golden_tables(single_process: None, backend: Backend, preset: str) -> None:
    """The tables were made without Transformer Engine's compiled part."""
    model = GlmvModel(GlmvConfig.from_preset(preset), ParallelConfig(), dtype=torch.bfloat16, backend=backend)
    assert tables.folded(list(tables.rows(model, tables.shards(model)))) == tables.read(f"{preset}_one")
