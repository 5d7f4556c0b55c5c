"""The model against transformers', in float32 with the same weights: logits, and the gradient of every parameter."""

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
from model.canonical_names import canonical_name
from model.config import GlmvConfig
from model.errors import ImageTokenError
from model.glmv import GlmvModel
from model.vision import bicubic_weights
from model.weights.load import local_tensors
from model.weights.table import weights
from tests.reference import (
    Element,
    Image,
    TestSample,
    Text,
    Video,
    forward_inputs,
    make_sample,
    pack,
    reference_gradients,
    transformers_logits,
    transformers_loss,
)

LOGITS = 5e-6  # largest absolute difference, at logits of scale 1
GRADIENTS = 2e-5  # relative, by the norm of a tensor

SAMPLES: dict[str, Sequence[Element]] = {
    "text": [Text(40)],
    "one image": [Text(3), Image(4, 6), Text(12)],
    "images of extreme shapes": [
        Text(2),
        Image(2, 300),
        Text(5),
        Image(300, 2),
        Image(2, 2),
        Text(1),
        Image(30, 24),
        Text(4),
    ],
    "aspect ratios beyond 200": [
        Text(2),
        Image(2, 404),
        Text(5),
        Image(410, 2),
        Text(3),
    ],
    "video and images": [
        Text(2),
        Image(4, 4),
        Text(3),
        Video(3, 4, 6),
        Text(2),
        Image(6, 2),
        Text(5),
    ],
    "two videos": [Text(2), Video(2, 4, 4), Text(6), Video(3, 6, 4), Text(4)],
    "begins with an image": [Image(4, 4), Text(9)],
}
PACK = ["video and images", "text", "two videos", "one image"]


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


# --- deliberately broken variants, which the comparison above must catch ----------------------------------------------


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


def height_and_width_positions_swapped(batch: Batch) -> Batch:
    return replace(batch, position_ids=batch.position_ids[[0, 2, 1]])


def positions_not_restarted(batch: Batch) -> Batch:
    positions = torch.arange(batch.input_ids.numel()).expand(3, -1)
    return replace(batch, position_ids=positions)


def patches_row_by_row(batch: Batch) -> Batch:
    """Put the patches of the first image (4x4) row by row, not in 2x2 blocks."""
    order = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).flatten()
    return replace(batch, patches=torch.cat([batch.patches[order], batch.patches[16:]]))


def frames_of_a_pair_swapped(batch: Batch) -> Batch:
    pair = slice(16, 16 + 2 * 24)
    swapped = batch.patches[pair].view(24, 2, 588).flip(1).reshape(-1, 588)
    return replace(batch, patches=torch.cat([batch.patches[:16], swapped, batch.patches[pair.stop :]]))


BROKEN_PACKS = [
    one_segment_off,
    first_two_segments_joined,
    height_and_width_positions_swapped,
    positions_not_restarted,
    patches_row_by_row,
    frames_of_a_pair_swapped,
]


@pytest.mark.fast
@pytest.mark.parametrize("broken", BROKEN_PACKS, ids=lambda f: f.__name__)
def test_broken_pack_misses_the_tolerance_a_hundredfold(model: GlmvModel, broken) -> None:
    samples = [sample(model, name) for name in PACK]
    batch = pack(samples, seq_length=256)
    difference = logits(model, batch) - logits(model, broken(batch))
    assert max(largest_differences(batch, difference)) >= 100 * LOGITS


@pytest.mark.fast
def test_mask_that_is_not_causal_misses_the_tolerance_a_hundredfold(model: GlmvModel) -> None:
    batch = alone(model, sample(model, "one image"))
    right = logits(model, batch)
    model.language_model.decoder.layers[1].self_attention.attn_mask_type = AttnMaskType.no_mask
    assert (logits(model, batch) - right).abs().max() >= 100 * LOGITS


def largest_differences(batch: Batch, difference: Tensor) -> list[float]:
    """Return the largest difference of each segment, padding excluded."""
    spans = zip(batch.cu_seqlens.tolist(), batch.segment_lengths.tolist(), strict=False)
    return [difference[begin : begin + length].abs().max().item() for begin, length in spans if length]


# --- image tokens that do not fit the images --------------------------------------------------------------------------


def smaller_grid(batch: Batch) -> Batch:
    return replace(batch, grid_thw=torch.tensor([[1, 2, 6]]), patches=batch.patches[:12])


def no_images(batch: Batch) -> Batch:
    return replace(
        batch, grid_thw=batch.grid_thw[:0], frames_per_image=batch.frames_per_image[:0], patches=batch.patches[:0]
    )


def no_image_tokens(batch: Batch) -> Batch:
    return replace(batch, input_ids=torch.full_like(batch.input_ids, 50))


def exchanged_grids(batch: Batch) -> Batch:
    """Exchange the grids of the first and the last image; the total of image tokens is still right."""
    order = [len(batch.grid_thw) - 1, *range(1, len(batch.grid_thw) - 1), 0]
    return replace(batch, grid_thw=batch.grid_thw[order])


def one_token_moved(batch: Batch) -> Batch:
    """Move an image token of the last image to the one before; no grid and no number of tokens changes."""
    ids, image_token = batch.input_ids.tolist(), GlmvConfig.from_preset("tiny_moe").image_token_id
    ends = [n for n, token in enumerate(ids) if token == image_token != ids[n + 1]]
    ids[ends[-2] + 1], ids[ends[-1]] = ids[ends[-1]], ids[ends[-2] + 1]
    return replace(batch, input_ids=torch.tensor(ids))


MISFITS = [
    # elements, what is wrong with the pack, error
    ("one image", smaller_grid, "image 1 has 6 image tokens in input_ids, its grid needs 3"),
    ("one image", no_images, r"input_ids has more runs of image tokens \(1\) than the pack has images \(0\)"),
    ("one image", no_image_tokens, "image 1 has 0 image tokens in input_ids, its grid needs 6"),
    # Image, three frame pairs, image: 4, 6, 6, 6 and 3 tokens.
    ("video and images", exchanged_grids, "image 1 has 4 image tokens in input_ids, its grid needs 3"),
    ("video and images", one_token_moved, "image 4 has 7 image tokens in input_ids, its grid needs 6"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("name", "break_pack", "error"), MISFITS)
def test_image_tokens_that_do_not_fit_stop_the_step(model: GlmvModel, name: str, break_pack, error: str) -> None:
    batch = alone(model, sample(model, name))
    with pytest.raises(ImageTokenError, match=error):
        logits(model, break_pack(batch))


# --- gradients --------------------------------------------------------------------------------------------------------


def test_every_gradient_equals_transformers(build, reference: nn.Module) -> None:
    model: GlmvModel = build().train()
    samples = [sample(model, name) for name in PACK]
    transformers_loss(reference, samples).backward()

    batch = pack(samples, seq_length=256)
    losses = model(**forward_inputs(batch), labels=batch.labels)
    ((losses.cpu() * batch.loss_mask).sum() / batch.loss_mask.sum()).backward()

    found = {
        canonical_name(model, name): parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    expected = reference_gradients(reference)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = ((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)).item()
        assert math.isfinite(error)
        assert error <= GRADIENTS, f"{name}: {error:.1e}"


def test_tower_gradients_are_zero_without_images(build) -> None:
    """They exist, so that no rank waits for them, and are zero, so that they change no sum."""
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
def test_docstring_examples_are_right(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_weight_table_has_every_parameter(model: GlmvModel) -> None:
    """So the test of gradients, which reads the table, compares all parameters."""
    assert {name for name, _ in local_tensors(model)} == {w.name for w in weights(model.glmv_config)}
