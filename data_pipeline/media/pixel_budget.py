"""The constants of the vision input, and how large images and videos may become.

A patch is 14x14 pixels and 2x2 patches make one token. The vision tower's first convolution spans two frames: a frame
pair fills both, a still image counts as two equal frames. Budgets in pixels count both frames.
"""

from __future__ import annotations

from dataclasses import dataclass

PATCH_SIZE = 14  # pixels
MERGE_SIZE = 2  # patches per side of a token
TEMPORAL_PATCH_SIZE = 2  # frames
PATCHES_PER_TOKEN = MERGE_SIZE**2
TOKEN_SIZE = PATCH_SIZE * MERGE_SIZE  # pixels per side of a token: both sides of an image become multiples of it
PIXELS_PER_TOKEN = TEMPORAL_PATCH_SIZE * TOKEN_SIZE**2
SLICE_BYTES = PATCH_SIZE * PATCH_SIZE * 3  # one patch of one frame

MIN_PIXELS = 112 * 112  # `shortest_edge` of the published processors: smaller images are enlarged
MIN_IMAGE_TOKENS = MIN_PIXELS // PIXELS_PER_TOKEN
MAX_ASPECT = 200  # times that one side may be as long as the other
MAX_DECODED_PIXELS = 89_478_485  # pixels of an image or frame; Pillow's own threshold for a decompression bomb


@dataclass(frozen=True)
class PixelBudget:
    """The largest size of an image and of a video."""

    image_max_tokens: int = 6144  # tokens per image
    video_max_tokens: int = 30000  # tokens per video, all frame pairs together
