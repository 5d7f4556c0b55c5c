"""What pictures and clips cost, for whole columns at once: `images.resized_size` in numpy.

    >>> resized_sizes(np.array([480, 60]), np.array([640, 4000]), max_tokens=6144)
    (array([476,  56]), array([ 644, 4004]))         # pixels: 17 x 23 and 2 x 143 tokens

The very same roundings as the scalar function, whose docstring says where they come from: quotients of integers are
correctly rounded in both, as long as they stay below 2**53, and numpy rounds halves to even as Python does.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.media.images import (
    FACTOR,
    MAX_ASPECT,
    MIN_PIXELS,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    TOKEN_PIXELS,
)


def resized_sizes(
    height: np.ndarray, width: np.ndarray, *, max_tokens: int, frames: np.ndarray | int = TEMPORAL_PATCH_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] heights and widths of pictures (or of the `frames` frames of clips) -> int64 [n] each, as the model
    sees them. Raises DataError if a picture has no area or is more than 200 times as long as it is wide."""
    height, width = height.astype(np.int64), width.astype(np.int64)
    if len(height) and min(height.min(), width.min()) < 1:
        raise DataError("a picture without area")
    small = (height < FACTOR) | (width < FACTOR)
    if small.any():
        scale = np.maximum(FACTOR / height[small], FACTOR / width[small])
        height[small] = (height[small] * scale).astype(np.int64)
        width[small] = (width[small] * scale).astype(np.int64)
    if (np.maximum(height, width) / np.minimum(height, width) > MAX_ASPECT).any():
        raise DataError(f"a picture with one side more than {MAX_ASPECT} times the other")

    volume = frames * height * width
    out_height, out_width = (np.rint(side / FACTOR).astype(np.int64) * FACTOR for side in (height, width))
    frames_used = np.rint(np.asarray(frames) / TEMPORAL_PATCH_SIZE).astype(np.int64) * TEMPORAL_PATCH_SIZE
    out_volume = frames_used * out_height * out_width
    most = max_tokens * TOKEN_PIXELS

    shrunk = out_volume > most
    if shrunk.any():
        shrink = np.sqrt(volume[shrunk] / most)
        for side, out in ((height, out_height), (width, out_width)):
            out[shrunk] = np.maximum(FACTOR, np.floor(side[shrunk] / shrink / FACTOR).astype(np.int64) * FACTOR)
    grown = ~shrunk & (out_volume < MIN_PIXELS)
    if grown.any():
        grow = np.sqrt(MIN_PIXELS / volume[grown])
        for side, out in ((height, out_height), (width, out_width)):
            out[grown] = np.ceil(side[grown] * grow / FACTOR).astype(np.int64) * FACTOR
    return out_height, out_width


def patches_of(
    height: np.ndarray, width: np.ndarray, *, max_tokens: int, frames: np.ndarray | int = TEMPORAL_PATCH_SIZE
) -> np.ndarray:
    """int64 [n]: patches of every picture, or of one frame pair of every clip. Four of them make a token."""
    out_height, out_width = resized_sizes(height, width, max_tokens=max_tokens, frames=frames)
    return (out_height // PATCH_SIZE) * (out_width // PATCH_SIZE)
