"""The vision tower, on megatron-core's TransformerBlock: patches of images and frame pairs to embeddings.

    patches -> patch embedding -> norm -> + positions -> 24 pre-norm blocks -> norm -> 2x2 downsample -> [tokens, 4096]

Shapes:  patches = sum of h*w over the images;  tokens = patches / 4;  a row of `grid_thw` is (1, h, w) in patches.
Patches come in 2x2 blocks, block by block and row by row, so that the downsample works on four consecutive patches:

    a 4x4 image     0  1  4  5
                    2  3  6  7
                    8  9 12 13
                   10 11 14 15

Source: report, section 2; transformers `Glm4vVisionModel` (the same for `Glm4vMoeVisionModel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.config import VISION_ROPE_THETA, VisionConfig
from model.decoder import glm_transformer_fields, layer_spec
from model.image_constants import CHANNELS, MERGE_SIZE, PIXEL_MEAN, PIXEL_STD
from model.rope import rotary_frequencies, vision_angles
from model.to_device import to_device


def vision_transformer_config(vision: VisionConfig, *, dtype: torch.dtype, **fields: Any) -> TransformerConfig:
    """Return megatron-core's configuration of the tower's blocks, whose MLP is `out_hidden_size` wide.

    Args:
        vision: Sizes of the tower.
        dtype: Dtype of the parameters.
        fields: The parallel layout, recompute and the backend's switches, as `TransformerConfig` names them.
    """
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.out_hidden_size,
        **glm_transformer_fields(vision.rms_norm_eps, dtype),
        **fields,
    )


def vision_block_spec(vision: VisionConfig, backend: BackendSpecProvider) -> TransformerBlockSubmodules:
    """Return the specs of the pre-norm blocks with full attention, and of the norm after the last."""
    layer = layer_spec(backend, AttnMaskType.no_mask)
    return TransformerBlockSubmodules(layer_specs=[layer] * vision.depth, layer_norm=backend.layer_norm(rms_norm=True))


class VisionEncoder(MegatronModule):
    """The vision tower without the adapter.

    Args:
        vision: Sizes of the tower.
        config: From `vision_transformer_config`.
        backend: Provider of the leaf modules.
        pg_collection: Process groups over which the blocks are sharded.
    """

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.vision = vision
        dtype, device = config.params_dtype, torch.cuda.current_device()
        patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        merge = vision.spatial_merge_size
        hidden = vision.hidden_size
        norm = backend.layer_norm(rms_norm=True)
        self.patch_embed = PatchEmbedding(vision.in_channels, hidden, patch, patch, dtype=dtype, device=device)
        self.post_conv_layernorm = norm(config=config, hidden_size=hidden, eps=vision.rms_norm_eps)
        self.position_embedding = PositionEmbedding(vision.position_grid**2, hidden, dtype=dtype, device=device)
        self.blocks = TransformerBlock(
            config, vision_block_spec(vision, backend), pg_collection=pg_collection, post_layer_norm=True
        )
        self.downsample = Downsample(hidden, vision.out_hidden_size, merge, merge, dtype=dtype, device=device)
        self.inv_freq = rotary_frequencies(vision.head_dim // 2, VISION_ROPE_THETA)

    def forward(self, patches: Tensor, grid_thw: Tensor, frames_per_image: Tensor) -> Tensor:
        """Embed images and frame pairs.

        Args:
            patches: uint8 [slices, 588] in (y, x, channel) order, on the device. A patch of an image is one slice, a
                patch of a frame pair two consecutive slices.
            grid_thw: int64 [images, 3], each (1, h, w) with even h and w, in main memory.
            frames_per_image: int32 [images], 1 for an image and 2 for a frame pair, in main memory.

        Returns:
            [tokens, out_hidden_size], tokens = patches / 4, in the order of the images.
        """
        shapes = [(h, w) for _, h, w in grid_thw.tolist()]
        lengths = grid_thw[:, 1] * grid_thw[:, 2]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        max_seqlen = max(h * w for h, w in shapes)
        segments = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
        rows, columns = to_device(patch_coordinates(grid_thw), patches.device)

        x = self.patch_embed(patches, lengths, frames_per_image)
        x = self.post_conv_layernorm(x)
        x = x + self.position_embedding(shapes).to(x.dtype)
        x = self.blocks(
            hidden_states=x.unsqueeze(1),
            attention_mask=None,
            rotary_pos_emb=vision_angles(rows, columns, self.inv_freq),
            packed_seq_params=segments,
        )
        return self.downsample(x.squeeze(1))


# With `overlap_param_gather`, megatron-core finishes gathering a module's weights just before the module is called. So
# the weights of a module are used only inside its own forward pass.


class PatchEmbedding(nn.Conv3d):
    """The projection of pixels: a convolution whose stride is its kernel.

    It is computed as a matrix product over flattened patches (channel, frame, y, x).
    """

    def forward(self, patches: Tensor, lengths: Tensor, frames_per_image: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise, use an image's single slice for both frames, and project.

        Args:
            patches: As `VisionEncoder.forward` takes them.
            lengths: int64 [images], patches of each image, in main memory.
            frames_per_image: As `VisionEncoder.forward` takes them.

        Returns:
            [patches, hidden].
        """
        per_patch = frames_per_image.long().repeat_interleave(lengths)  # slices of each patch, 1 or 2
        first = per_patch.cumsum(0) - per_patch
        both = torch.stack([first, first + per_patch - 1], dim=1)
        both = to_device(both, patches.device)  # [patches, 2]
        mean, std = (
            to_device(torch.tensor(v).mul(255).view(CHANNELS, 1), patches.device) for v in (PIXEL_MEAN, PIXEL_STD)
        )
        # Transpose the bytes, which are cheaper to move than floats.
        colours = patches.view(-1, patches.size(1) // CHANNELS, CHANNELS).transpose(1, 2).contiguous()
        normalised = ((colours.float() - mean) / std).to(self.weight.dtype)
        patches = normalised[both].transpose(1, 2).flatten(1)  # [patches, 3 * 2 * 196]
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PositionEmbedding(nn.Embedding):
    """The square table of learned positions, sampled bicubically at every patch centre.

    Sampling is linear in the table and separable, so it is two matrix products. Their backward pass is deterministic;
    that of grid_sample is not on a GPU. Images of the same shape are sampled once.
    """

    def forward(self, shapes: Sequence[tuple[int, int]]) -> Tensor:  # type: ignore[override]
        """Return the positions of all patches, float32 [patches, hidden]; `shapes` are (h, w) of the images."""
        side = isqrt(self.num_embeddings)
        table = self.weight.float().view(side, side, -1)
        sampled: dict[tuple[int, int], Tensor] = {}
        for h, w in shapes:
            if (h, w) not in sampled:
                along_rows, along_columns = (to_device(bicubic_weights(n, side), table.device) for n in (h, w))
                grid = torch.einsum("hi,ijd->hjd", along_rows, table)
                grid = torch.einsum("wj,hjd->hwd", along_columns, grid)
                rows, columns = to_device(patch_coordinates(torch.tensor([[1, h, w]])), table.device)
                sampled[h, w] = grid[rows, columns]
        return torch.cat([sampled[shape] for shape in shapes])


class Downsample(nn.Conv2d):
    """A 2x2 convolution of stride 2.

    Patches come in 2x2 blocks, so it is computed as a matrix product over four consecutive patches.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [patches, hidden] to [patches / 4, out_hidden]."""
        blocks = x.unflatten(0, (-1, self.kernel_size[0] * self.kernel_size[1])).transpose(1, 2).flatten(1)
        return F.linear(blocks, self.weight.flatten(1), self.bias)


def patch_coordinates(grid_thw: Tensor) -> Tensor:
    """Return row and column of every patch of every image, in the order of the patches (2x2 blocks, row by row).

    Args:
        grid_thw: int64 [images, 3], each (1, h, w).

    Returns:
        int64 [2, patches].

    >>> patch_coordinates(torch.tensor([[1, 2, 4], [1, 2, 2]])).tolist()
    [[0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1]]
    """
    lengths = grid_thw.prod(dim=1)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    blocks_in_row = (grid_thw[:, 2] // MERGE_SIZE).repeat_interleave(lengths)
    index = torch.arange(len(begins)) - begins
    block, in_block = index // MERGE_SIZE**2, index % MERGE_SIZE**2
    rows = MERGE_SIZE * (block // blocks_in_row) + in_block // MERGE_SIZE
    columns = MERGE_SIZE * (block % blocks_in_row) + in_block % MERGE_SIZE
    return torch.stack([rows, columns])


@lru_cache(maxsize=4096)
def bicubic_weights(size: int, table: int) -> Tensor:
    """Return the matrix that samples a row of `table` values at the centres of `size` equal cells.

    Cubic convolution with a = -0.75; the edge value stands in for neighbours beyond the edge. It equals torch's
    `grid_sample` with `mode="bicubic", padding_mode="border", align_corners=False`. Source: report, equations 1 and 2.

    Returns:
        float32 [size, table], each row sums to 1.
    """
    centres = 2 * ((torch.arange(size) + 0.5) / size) - 1
    at = ((centres + 1) * table - 1) / 2
    base = at.floor()
    t = (at - base)[:, None] + torch.tensor([1.0, 0.0, -1.0, -2.0])  # distances to the four neighbours
    d, a = t.abs(), -0.75
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    neighbours = (base[:, None].long() + torch.arange(-1, 3)).clamp(0, table - 1)
    return torch.zeros(size, table).scatter_add_(1, neighbours, torch.where(d <= 1, near, far))
