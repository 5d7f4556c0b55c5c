"""The cost model: FLOPs of every part of the model, from its configuration and the sizes of its inputs.

It counts matrix products over USEFUL positions, two FLOPs per multiply-add. It does not count norms, activations, rope,
softmax, the embedding table, the bicubic positions, padding and recompute. A backward pass counts as two forward
passes.

The cost of a part depends on the segments within which it attends: linear * n + squared * n**2 for a segment of n
positions. Positions are patches in the vision tower and tokens in the decoder.

    part               linear                            squared   legend
    patch embedding    2 * 1176 d                                  d  width of the tower     D  width of its MLPs
    vision block       2 * (4 d**2 + 3 d D)              4 d          and of the decoder
    downsample         2 * 4 d D / 4                               F  width of the adapter's MLP
    adapter            2 * (D**2 + 3 D F) / 4                      q  heads * head_dim       k  groups * head_dim
    decoder attention  2 * D (q + 2 k) + 2 * q D         2 q       f  width of the dense MLP
    dense MLP          2 * 3 D f                                   m  width of an expert     E  experts
    MoE                2 * D E + 2 * 3 D m (topk + shared)
    output layer       2 * D vocabulary

Four patches make one token. An image attends to all of itself, so QK^T and PV take 2 d n**2 each. Causal attention
computes half of the square; the other half of the diagonal, n/2 pairs, is not counted, as usual.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import DecoderConfig, VisionConfig

FORWARD_AND_BACKWARD = 3  # in forward passes: the gradients of inputs and of weights take one each


@dataclass(frozen=True)
class SegmentCost:
    """Forward FLOPs of a segment of n positions: linear * n + squared * n**2."""

    linear: int  # FLOPs per position
    squared: int = 0  # FLOPs per pair of positions

    def __add__(self, other: SegmentCost) -> SegmentCost:
        return SegmentCost(self.linear + other.linear, self.squared + other.squared)

    def __mul__(self, times: int) -> SegmentCost:
        return SegmentCost(self.linear * times, self.squared * times)

    def of(self, *lengths: int) -> int:
        """Return the FLOPs of segments of these lengths together."""
        return sum((self.linear + self.squared * n) * n for n in lengths)


def tower_cost(vision: VisionConfig) -> SegmentCost:
    """Return the cost of the tower for an image or frame pair of n PATCHES."""
    d, width = vision.hidden_size, vision.out_hidden_size
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = SegmentCost(2 * (4 * d * d + 3 * d * width), squared=4 * d)
    return SegmentCost(2 * patch_values * d) + block * vision.depth + SegmentCost(2 * d * width)


def adapter_cost(vision: VisionConfig) -> SegmentCost:
    """Return the cost of the adapter for an image or frame pair of n PATCHES."""
    width, inside = vision.out_hidden_size, vision.intermediate_size
    return SegmentCost(2 * (width * width + 3 * width * inside) // vision.spatial_merge_size**2)


def vision_cost(vision: VisionConfig) -> SegmentCost:
    """Return the cost of tower and adapter for an image or frame pair of n PATCHES."""
    return tower_cost(vision) + adapter_cost(vision)


def image_cost(vision: VisionConfig, h: int, w: int) -> int:
    """Return the forward FLOPs of an image or frame pair of h x w patches."""
    return vision_cost(vision).of(h * w)


def layer_cost(decoder: DecoderConfig, layer: int) -> SegmentCost:
    """Return the cost of decoder layer `layer` (from 0), dense or a mixture of experts, for a segment of n tokens."""
    hidden = decoder.hidden_size
    q = decoder.num_attention_heads * decoder.head_dim
    k = decoder.num_key_value_heads * decoder.head_dim
    attention = SegmentCost(2 * hidden * (q + 2 * k) + 2 * q * hidden, squared=2 * q)
    if not decoder.is_moe_layer(layer):
        return attention + SegmentCost(2 * 3 * hidden * decoder.intermediate_size)
    router = 2 * hidden * decoder.n_routed_experts
    experts = decoder.num_experts_per_tok + decoder.n_shared_experts
    return attention + SegmentCost(router + 2 * 3 * hidden * decoder.moe_intermediate_size * experts)


def head_cost(decoder: DecoderConfig) -> SegmentCost:
    """Return the cost of the output layer for a segment of n tokens."""
    return SegmentCost(2 * decoder.hidden_size * decoder.vocab_size)


def decoder_cost(decoder: DecoderConfig) -> SegmentCost:
    """Return the cost of all decoder layers and the output layer for a segment of n tokens."""
    return sum((layer_cost(decoder, layer) for layer in range(decoder.num_hidden_layers)), start=head_cost(decoder))
