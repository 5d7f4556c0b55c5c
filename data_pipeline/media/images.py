"""Images: bytes -> upright RGB -> the model's size -> uint8 patches.

The reference is transformers' default (torchvision) GLM image processor, `Glm4vImageProcessor`, reading files as
`transformers.image_utils.load_image` does. Its last step, (x/255 - mean) / std in float32, is left to the model: pixels
travel as uint8, and a patch of an image is stored once although the model's convolution sees it in both frames.

Shapes: H, W pixels of the resized image (multiples of 28); h = H/14, w = W/14 patches; T frames.
"""

from __future__ import annotations

import numpy as np
import torch

from data_pipeline.media.image_files import decode_image
from data_pipeline.media.image_sizes import grid_of, resized_size
from data_pipeline.media.pixel_budget import MERGE_SIZE, PATCH_SIZE, SLICE_BYTES, TOKEN_SIZE


def as_frames(rgb: np.ndarray) -> torch.Tensor:
    """Return uint8 [height, width, 3] as uint8 [1, 3, height, width] over the same memory (channels last)."""
    return torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize frames with antialiased bicubic interpolation, as torchvision does it.

    The memory is made channels last: torch's vectorised kernel takes half the time there, and gives the same pixels.

    Args:
        frames: uint8 [T, 3, height, width].
        size: (H, W) in pixels.

    Returns:
        uint8 [T, 3, H, W].
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    frames = frames.contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True)


def patchify(frames: torch.Tensor) -> torch.Tensor:
    """Cut one image (T=1) or frame pair (T=2) into patches.

    Patches come in blocks of 2x2, block by block; a patch's T slices are neighbours, each in (y, x, channel) order.

    One copy: NumPy moves a patch's row of pixels, 14 x 3 bytes, as one element. That takes 0.3 of 2.6 ms for half a
    megapixel; separating the colours here as well would take 0.8. The model does that on its device.

    Args:
        frames: uint8 [T, 3, H, W].

    Returns:
        Slices, uint8 [h*w*T, 588].
    """
    count, _, height, width = frames.shape
    row = np.dtype((np.void, PATCH_SIZE * 3))
    pixels = frames.permute(0, 2, 3, 1).contiguous().numpy().reshape(count, height, width * 3)
    rows = pixels.view(row).reshape(
        count, height // TOKEN_SIZE, MERGE_SIZE, PATCH_SIZE, width // TOKEN_SIZE, MERGE_SIZE
    )
    return torch.from_numpy(rows.transpose(1, 4, 2, 5, 0, 3).copy().view(np.uint8).reshape(-1, SLICE_BYTES))


def image_patches(data: bytes, max_tokens: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return an image's slices, uint8 [h*w, 588], and its grid (h, w).

    Raises:
        BadSample: The image cannot be read, is too large or too narrow.
    """
    rgb = decode_image(data)
    size = resized_size(rgb.shape[0], rgb.shape[1], max_tokens=max_tokens)
    return patchify(resize(as_frames(rgb), size)), grid_of(size)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], frames: int) -> np.ndarray:
    """Return the pixels, uint8 [frames, height, width, 3], of patches, uint8 [h * w * frames, 588].

    The inverse of `patchify`. `grid` is (h, w) in patches.
    """
    h, w = grid
    blocks = patches.reshape(
        h // MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE, frames, PATCH_SIZE, PATCH_SIZE, 3
    )
    return blocks.permute(4, 0, 2, 5, 1, 3, 6, 7).reshape(frames, h * PATCH_SIZE, w * PATCH_SIZE, 3).numpy()
