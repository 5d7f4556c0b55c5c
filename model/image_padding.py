"""Pad the patches of a pack with a black image, so that their number fits FP8 kernels.

The black image is a segment of its own: no patch of another image attends to it, and its embeddings are dropped. So it
changes only the scales of recipes that take one scale for a whole tensor.

    images of 4 and 12 patches, a multiple of 64     ->  4 + 12 + 48 patches, the last as an image of 2 x 24
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import Fp8Config
from model.image_constants import MERGE_SIZE


def image_multiple(fp8: Fp8Config) -> int:
    """Return what the patches of a pack must be a multiple of; 1 where the tower is not in FP8.

    The adapter has one token for MERGE_SIZE x MERGE_SIZE patches.
    """
    return MERGE_SIZE**2 * fp8.multiple if fp8.enabled and fp8.vision else 1


def pad_images(
    patches: Tensor, grid_thw: Tensor, frames_per_image: Tensor, multiple: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Append a black image, if needed.

    Args:
        patches: uint8 [slices, 588], as `VisionEncoder.forward` takes them.
        grid_thw: int64 [images, 3], each (1, h, w).
        frames_per_image: int32 [images].
        multiple: What the number of patches is to be a multiple of: 1, or a multiple of MERGE_SIZE squared.

    Returns:
        The same three, with the black image.
    """
    lacking = -int(grid_thw.prod(dim=1).sum()) % multiple
    if not lacking:
        return patches, grid_thw, frames_per_image
    shape = grid_thw.new_tensor([[1, MERGE_SIZE, lacking // MERGE_SIZE]])
    return (
        F.pad(patches, (0, 0, 0, lacking)),
        torch.cat([grid_thw, shape]),
        torch.cat([frames_per_image, frames_per_image.new_ones(1)]),
    )
