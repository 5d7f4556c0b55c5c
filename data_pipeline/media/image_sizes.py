"""The size at which the model sees an image: for one image, and for whole columns at once, in NumPy.

    >>> resized_sizes(np.array([480, 60]), np.array([640, 4000]), max_tokens=6144)
    (array([476,  56]), array([ 644, 4004]))         # pixels: 17 x 23 and 2 x 143 tokens

The roundings are those of the scalar function: quotients of integers are correctly rounded in both, as long as they
stay below 2**53, and NumPy rounds halves to even as Python does.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.pixel_budget import (
    MAX_ASPECT,
    MIN_PIXELS,
    PATCH_SIZE,
    PATCHES_PER_TOKEN,
    PIXELS_PER_TOKEN,
    TEMPORAL_PATCH_SIZE,
    TOKEN_SIZE,
)


@lru_cache(maxsize=65536)
def resized_size(height: int, width: int, *, max_tokens: int, frames: int = TEMPORAL_PATCH_SIZE) -> tuple[int, int]:
    """Return the size at which the model sees an image, or each frame of a video.

    Sides become multiples of 28; frames*H*W lies between MIN_PIXELS and max_tokens * PIXELS_PER_TOKEN, unless a side of
    one token is already too much. Same arithmetic, roundings included, as transformers' `smart_resize`.

    Args:
        height: Pixels.
        width: Pixels.
        max_tokens: The largest number of tokens of the image or video.
        frames: Frames of the video; 2 for an image.

    Returns:
        (H, W) in pixels.

    Raises:
        BadSample: `extreme_aspect`, if one side is more than 200 times the other or the image has no area.
    """
    if min(height, width) < 1:
        raise BadSample("extreme_aspect", f"an image of {width}x{height} pixels has no area")
    original = f"{width}x{height}"
    if height < TOKEN_SIZE or width < TOKEN_SIZE:
        scale = max(TOKEN_SIZE / height, TOKEN_SIZE / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise BadSample("extreme_aspect", f"{original}: one side is more than {MAX_ASPECT} times the other")

    volume = frames * height * width
    rounded = (round(height / TOKEN_SIZE) * TOKEN_SIZE, round(width / TOKEN_SIZE) * TOKEN_SIZE)
    rounded_volume = round(frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE * rounded[0] * rounded[1]
    if rounded_volume > max_tokens * PIXELS_PER_TOKEN:
        shrink = math.sqrt(volume / (max_tokens * PIXELS_PER_TOKEN))
        return (
            max(TOKEN_SIZE, math.floor(height / shrink / TOKEN_SIZE) * TOKEN_SIZE),
            max(TOKEN_SIZE, math.floor(width / shrink / TOKEN_SIZE) * TOKEN_SIZE),
        )
    if rounded_volume < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / volume)
        return math.ceil(height * grow / TOKEN_SIZE) * TOKEN_SIZE, math.ceil(width * grow / TOKEN_SIZE) * TOKEN_SIZE
    return rounded


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (h, w) patches of an image of (H, W) pixels."""
    return size[0] // PATCH_SIZE, size[1] // PATCH_SIZE


def tokens_of(grid: tuple[int, int]) -> int:
    """Return the tokens of one image or frame pair of (h, w) patches."""
    return grid[0] * grid[1] // PATCHES_PER_TOKEN


def resized_sizes(
    height: np.ndarray, width: np.ndarray, *, max_tokens: int, frames: np.ndarray | int = TEMPORAL_PATCH_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes at which the model sees images, or the frames of videos.

    Args:
        height: int [n], pixels.
        width: int [n], pixels.
        max_tokens: The largest number of tokens of each image or video.
        frames: int [n] or one number, frames of each video; 2 for images.

    Returns:
        H and W, int64 [n] each, in pixels.

    Raises:
        DataError: An image has no area or is more than 200 times as long as it is wide.
    """
    height, width = height.astype(np.int64), width.astype(np.int64)
    if len(height) and min(height.min(), width.min()) < 1:
        raise DataError("an image has no area")
    small = (height < TOKEN_SIZE) | (width < TOKEN_SIZE)
    if small.any():
        scale = np.maximum(TOKEN_SIZE / height[small], TOKEN_SIZE / width[small])
        height[small] = (height[small] * scale).astype(np.int64)
        width[small] = (width[small] * scale).astype(np.int64)
    if (np.maximum(height, width) / np.minimum(height, width) > MAX_ASPECT).any():
        raise DataError(f"an image has one side more than {MAX_ASPECT} times the other")

    volume = frames * height * width
    out_height, out_width = (np.rint(side / TOKEN_SIZE).astype(np.int64) * TOKEN_SIZE for side in (height, width))
    frames_used = np.rint(np.asarray(frames) / TEMPORAL_PATCH_SIZE).astype(np.int64) * TEMPORAL_PATCH_SIZE
    out_volume = frames_used * out_height * out_width
    max_pixels = max_tokens * PIXELS_PER_TOKEN

    shrunk = out_volume > max_pixels
    if shrunk.any():
        shrink = np.sqrt(volume[shrunk] / max_pixels)
        for side, out in ((height, out_height), (width, out_width)):
            tokens = np.floor(side[shrunk] / shrink / TOKEN_SIZE).astype(np.int64)
            out[shrunk] = np.maximum(TOKEN_SIZE, tokens * TOKEN_SIZE)
    grown = ~shrunk & (out_volume < MIN_PIXELS)
    if grown.any():
        grow = np.sqrt(MIN_PIXELS / volume[grown])
        for side, out in ((height, out_height), (width, out_width)):
            out[grown] = np.ceil(side[grown] * grow / TOKEN_SIZE).astype(np.int64) * TOKEN_SIZE
    return out_height, out_width


def patches_of(
    height: np.ndarray, width: np.ndarray, *, max_tokens: int, frames: np.ndarray | int = TEMPORAL_PATCH_SIZE
) -> np.ndarray:
    """Return the patches of every image, or of one frame pair of every video, int64 [n]. Four patches make a token.

    The arguments and errors are those of `resized_sizes`.
    """
    out_height, out_width = resized_sizes(height, width, max_tokens=max_tokens, frames=frames)
    return (out_height // PATCH_SIZE) * (out_width // PATCH_SIZE)
