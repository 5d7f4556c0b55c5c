"""Our model against transformers', in float32 with the same weights: logits, and the gradient of every parameter."""

from __future__ import annotations

import doctest
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from data_pipeline.encoding.batch import Batch
from model import glmv, vision
from model.glmv import GlmvModel
from model.hf_weights import local_tensors
from model.vision import bicubic_weights
from model.weight_table import weights
from tests.reference import (
    Clip,
    Part,
    Picture,
    TestSample,
    Words,
    forward_inputs,
    make_sample,
    pack,
    reference_gradients,
    transformers_logits,
    transformers_loss,
)

LOGITS = 5e-6  # largest absolute difference, at logits of scale 1
GRADIENTS = 2e-5  # relative, by the norm of a tensor

SAMPLES: dict[str, Sequence[Part]] = {
    "text": [Words(40)],
    "one picture": [Words(3), Picture(4, 6), Words(12)],
    "pictures of extreme shapes": [
        Words(2), Picture(2, 300), Words(5), Picture(300, 2), Picture(2, 2), Words(1), Picture(30, 24), Words(4),
    ],
    "beyond 1:200": [Words(2), Picture(2, 404), Words(5), Picture(410, 2), Words(3)],
    "clip and pictures": [Words(2), Picture(4, 4), Words(3), Clip(3, 4, 6), Words(2), Picture(6, 2), Words(5)],
    "two clips": [Words(2), Clip(2, 4, 4), Words(6), Clip(3, 6, 4), Words(4)],
    "begins with a picture": [Picture(4, 4), Words(9)],
}  # fmt: skip
PACK = ["clip and pictures", "text", "two clips", "one picture"]


def sample(model: GlmvModel, name: str) -> TestSample:
    return make_sample(model.glmv_config, SAMPLES[name], seed=len(name))


def alone(model: GlmvModel, one: TestSample) -> Batch:
    return pack([one], seq_length=len(one.encoded), segment_multiple=1)


@torch.no_grad()
def logits(model: GlmvModel, batch: Batch) -> Tensor:
    return model(**forward_inputs(batch)).cpu()


@pytest.mark.fast
@pytest.mark.parametrize("name", SAMPLES)
def test_logits_equal_transformers(model: GlmvModel, reference: nn.Module, name: str) -> None:
    one = sample(model, name)
    with torch.no_grad():
        expected = transformers_logits(reference, one)
    assert 0.5 < expected.std() < 2
    assert (logits(model, alone(model, one)) - expected).abs().max() <= LOGITS


@pytest.mark.fast
def test_packed_samples_equal_each_run_alone(model: GlmvModel, reference: nn.Module) -> None:
    samples = [sample(model, name) for name in PACK]
    batch = pack(samples, seq_length=256)
    packed = logits(model, batch)
    for one, begin in zip(samples, batch.cu_seqlens.tolist(), strict=False):
        with torch.no_grad():
            expected = transformers_logits(reference, one)
        assert (packed[begin : begin + len(one.encoded)] - expected).abs().max() <= LOGITS


# --- broken twins: what the comparison above must not let through -----------------------------------------------------


def one_segment_off(batch: Batch) -> Batch:
    bounds = batch.cu_seqlens.clone()
    bounds[1] += 8
    return replace(batch, cu_seqlens=bounds)


def first_two_segments_joined(batch: Batch) -> Batch:
    return replace(
        batch,
        cu_seqlens=torch.cat([batch.cu_seqlens[:1], batch.cu_seqlens[2:]]),
        segment_lengths=torch.cat([batch.segment_lengths[:2].sum(0, keepdim=True), batch.segment_lengths[2:]]),
    )


def positions_of_height_and_width_swapped(batch: Batch) -> Batch:
    return replace(batch, position_ids=batch.position_ids[[0, 2, 1]])


def positions_not_restarted(batch: Batch) -> Batch:
    run_on = torch.arange(batch.input_ids.numel()).expand(3, -1)
    return replace(batch, position_ids=run_on)


def patches_row_by_row(batch: Batch) -> Batch:
    """The first picture's patches (4x4) in plain order, not in 2x2 blocks."""
    order = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).flatten()
    return replace(batch, patches=torch.cat([batch.patches[order], batch.patches[16:]]))


def frames_of_a_pair_swapped(batch: Batch) -> Batch:
    pair = slice(16, 16 + 2 * 24)
    swapped = batch.patches[pair].view(24, 2, 588).flip(1).reshape(-1, 588)
    return replace(batch, patches=torch.cat([batch.patches[:16], swapped, batch.patches[pair.stop :]]))


TWINS = [
    one_segment_off, first_two_segments_joined, positions_of_height_and_width_swapped, positions_not_restarted,
    patches_row_by_row, frames_of_a_pair_swapped,
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("broken", TWINS, ids=lambda f: f.__name__)
def test_a_broken_pack_is_far_off(model: GlmvModel, broken) -> None:
    samples = [sample(model, name) for name in PACK]
    batch = pack(samples, seq_length=256)
    difference = logits(model, batch) - logits(model, broken(batch))
    assert max(useful(batch, difference)) >= 100 * LOGITS


@pytest.mark.fast
def test_a_mask_that_is_not_causal_is_far_off(model: GlmvModel) -> None:
    batch = alone(model, sample(model, "one picture"))
    right = logits(model, batch)
    model.language_model.decoder.layers[1].self_attention.attn_mask_type = AttnMaskType.no_mask
    assert (logits(model, batch) - right).abs().max() >= 100 * LOGITS


def useful(batch: Batch, difference: Tensor) -> list[float]:
    """Largest difference of each sample, padding left out."""
    spans = zip(batch.cu_seqlens.tolist(), batch.segment_lengths.tolist(), strict=False)
    return [difference[begin : begin + length].abs().max().item() for begin, length in spans if length]


@pytest.mark.fast
def test_images_and_image_tokens_must_match(model: GlmvModel) -> None:
    batch = alone(model, sample(model, "one picture"))
    short = replace(batch, grid_thw=torch.tensor([[1, 2, 6]]), patches=batch.patches[:12])
    with pytest.raises(ValueError, match="6 image tokens but its images make 3"):
        logits(model, short)
    without_images = replace(
        batch, grid_thw=batch.grid_thw[:0], frames_per_image=batch.frames_per_image[:0], patches=batch.patches[:0]
    )
    with pytest.raises(ValueError, match="6 image tokens but its images make 0"):
        logits(model, without_images)
    without_tokens = replace(batch, input_ids=torch.full_like(batch.input_ids, 50))
    with pytest.raises(ValueError, match="0 image tokens but its images make 6"):
        logits(model, without_tokens)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_every_gradient_equals_transformers(build, reference: nn.Module) -> None:
    model: GlmvModel = build().train()
    samples = [sample(model, name) for name in PACK]
    transformers_loss(reference, samples).backward()

    batch = pack(samples, seq_length=256)
    losses = model(**forward_inputs(batch), labels=batch.labels)
    ((losses.cpu() * batch.loss_mask).sum() / batch.loss_mask.sum()).backward()

    ours = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = reference_gradients(reference)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        error = ((ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)).item()
        assert math.isfinite(error)
        assert error <= GRADIENTS, f"{name}: {error:.1e}"


def test_a_model_without_images_has_zero_gradients_in_the_tower(build) -> None:
    """They are there, so that no rank waits for them, and they are zero, so that nothing is diluted."""
    model: GlmvModel = build().train()
    batch = alone(model, sample(model, "text"))
    model(**forward_inputs(batch), labels=batch.labels).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(("vision_model.", "adapter.")):
            assert not parameter.grad.any(), name
    assert any(parameter.grad.any() for _, parameter in model.language_model.named_parameters())


# --- positions of the vision tower ------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(("h", "w"), [(2, 2), (24, 24), (2, 404), (100, 36), (50, 58)])
def test_bicubic_weights_equal_grid_sample(h: int, w: int) -> None:
    table = torch.randn(24, 24, 5, generator=torch.Generator().manual_seed(h * w))
    rows, columns = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (h, w))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)[None]
    expected = torch.nn.functional.grid_sample(
        table.permute(2, 0, 1)[None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )[0].permute(1, 2, 0)
    sampled = torch.einsum("hi,wj,ijd->hwd", bicubic_weights(h, 24), bicubic_weights(w, 24), table)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=5e-6)


@pytest.mark.fast
@pytest.mark.parametrize("module", [vision, glmv], ids=["vision", "glmv"])
def test_the_examples_in_docstrings_hold(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_local_names_cover_the_table(model: GlmvModel) -> None:
    """What the gradient test compares is all there is."""
    assert {name for name, _ in local_tensors(model)} == {w.name for w in weights(model.glmv_config)}
