"""The cost model, compared with torch's count of the real model and with published figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.encoding.batch import Batch
from model.config import GlmvConfig
from model.flops import FORWARD_AND_BACKWARD, SegmentCost, decoder_cost, head_cost, layer_cost, vision_cost
from model.glmv import GlmvModel
from model.pipeline_layout import unit_costs
from tests.reference import Element, Image, Text, Video, forward_inputs, make_sample, pack

pytestmark = pytest.mark.fast

GLM_45V = GlmvConfig.from_preset("glm45v")
PACKS: dict[str, Sequence[Sequence[Element]]] = {
    "text": [[Text(40)], [Text(24)]],
    "images of several sizes": [
        [Text(6), Image(4, 6), Text(2), Image(8, 8), Text(6)],
        [Text(16)],
    ],
    "a video": [[Text(1), Video(3, 4, 4), Text(12)], [Image(2, 2), Text(13)]],
}


def make_pack(model: GlmvModel, name: str) -> Batch:
    """Make a pack without padding, which the model computes but the cost model does not count."""
    samples = [make_sample(model.glmv_config, elements, seed=n) for n, elements in enumerate(PACKS[name])]
    batch = pack(samples, seq_length=sum(len(sample.encoded) for sample in samples), segment_multiple=1)
    assert batch.cu_seqlens.diff().tolist() == batch.segment_lengths.tolist()
    return batch


def count(model: GlmvModel, batch: Batch, *, backward: bool) -> int:
    """Count the FLOPs with torch, which counts fused attention as zero on a CPU: use the plain one."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        out = model(**forward_inputs(batch))
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def counted_by_torch_alone(config: GlmvConfig, batch: Batch, *, backward: bool) -> int:
    """Return the FLOPs that torch counts and the cost model does not, less those that only the cost model counts."""
    vision, decoder = config.vision, config.decoder
    side, width = vision.position_grid, vision.hidden_size
    grids = {(h, w) for _, h, w in batch.grid_thw.tolist()} or {(2, 2)}
    # The position table is sampled along rows, then along columns, once per shape; only the table has a gradient.
    rows = sum(2 * h * side * side * width for h, _ in grids)
    columns = sum(2 * h * w * side * width for h, w in grids)
    # Plain attention also computes the half of the square that a causal mask hides.
    squares = sum(n * n for n in batch.segment_lengths.tolist())
    hidden_half = 2 * decoder.num_attention_heads * decoder.head_dim * squares * decoder.num_hidden_layers
    # Without images the model runs the tower on four black patches.
    black = 0 if len(batch.grid_thw) else vision_cost(vision).of(4)
    patches = int(batch.grid_thw.prod(1).sum()) or 4
    pixel_gradients = 2 * 1176 * width * patches  # not needed, so torch does not compute them
    if not backward:
        return rows + columns + hidden_half + black
    return 2 * (rows + columns) + 3 * (hidden_half + black) - pixel_gradients


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("backward", [False, True])
def test_cost_equals_flops_that_torch_counts_in_the_model(model: GlmvModel, name: str, backward: bool) -> None:
    batch, config = make_pack(model, name), model.glmv_config
    lengths, patches = batch.segment_lengths.tolist(), batch.grid_thw.prod(1).tolist()
    costs = unit_costs(config, lengths, patches)
    trained = costs.first + sum(costs.layers) + costs.last
    predicted = trained if backward else trained // FORWARD_AND_BACKWARD
    counted = count(model, batch, backward=backward)
    assert counted - counted_by_torch_alone(config, batch, backward=backward) == predicted


def test_causal_attention_costs_half_of_the_square() -> None:
    """Pairs of query and key, counted one by one; half of the diagonal is not counted."""
    n, decoder = 37, GLM_45V.decoder
    visible = sum(key <= query for query in range(n) for key in range(n))
    flops_of_a_pair = 4 * decoder.num_attention_heads * decoder.head_dim
    assert layer_cost(decoder, 0).squared * n * n == flops_of_a_pair * (visible - n / 2)


def test_cost_is_two_flops_per_token_and_active_published_parameter() -> None:
    """Parameters of the published GLM-4.5V (about 12 B active), without those outside matrix products."""
    attention, shared, dense, router, head = 5_017_047_040, 778_567_680, 134_479_872, 23_592_960, 620_756_992
    routed = 99_656_663_040 * 8 // 128
    biases = 46 * (96 + 2 * 8) * 128
    assert decoder_cost(GLM_45V.decoder).linear == 2 * (attention - biases + shared + dense + router + routed + head)
    assert decoder_cost(GLM_45V.decoder).linear - head_cost(GLM_45V.decoder).linear == pytest.approx(2 * 12.18e9, 1e-3)

    blocks, patch_embedding, downsample, merger = 679_550_976, 1_807_872, 25_169_920, 151_265_280
    norms_and_biases = 24 * 2 * 1536, 1536, 4096, 2 * 4096
    by_patch = blocks - norms_and_biases[0] + patch_embedding - norms_and_biases[1]
    by_token = downsample - norms_and_biases[2] + merger - norms_and_biases[3]
    assert vision_cost(GLM_45V.vision).linear == 2 * by_patch + 2 * by_token // 4


def test_moe_layer_with_all_experts_chosen_costs_as_much_as_a_dense_layer() -> None:
    decoder = GLM_45V.decoder
    every = replace(decoder, num_experts_per_tok=128, n_shared_experts=1)
    wide = replace(decoder, intermediate_size=(128 + 1) * decoder.moe_intermediate_size)
    router = SegmentCost(2 * decoder.hidden_size * 128)
    assert layer_cost(every, 1) == layer_cost(wide, 0) + router


def test_segment_costs_more_than_its_halves() -> None:
    cost = decoder_cost(GLM_45V.decoder)
    assert cost.of(8192) - cost.of(4096, 4096) == cost.squared * (8192**2 - 2 * 4096**2)
