"""Patches as transformers takes them: normalised, and in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.media.pixel_budget import PATCH_SIZE, TEMPORAL_PATCH_SIZE
from model.image_constants import PIXEL_MEAN, PIXEL_STD


def pixel_values(sample: EncodedSample, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD) -> Tensor:
    """Return a sample's patches normalised, float32 [patches, 1176], each in (channel, frame, y, x) order."""
    means, stds = (torch.tensor(values).view(3, 1, 1, 1) for values in (mean, std))
    patches = []
    sizes = [h * w * frames for (h, w), frames in zip(sample.grids, sample.frames_per_image, strict=True)]
    for slices, frames in zip(sample.patches.split(sizes), sample.frames_per_image, strict=True):
        values = slices.view(-1, frames, PATCH_SIZE, PATCH_SIZE, 3).permute(0, 4, 1, 2, 3).float()
        both = ((values / 255 - means) / stds).expand(-1, -1, TEMPORAL_PATCH_SIZE, -1, -1)
        patches.append(both.flatten(1))
    return torch.cat(patches)
