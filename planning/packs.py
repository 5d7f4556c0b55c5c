"""The packs that a plan is made for: lengths and image sizes, without words and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_pipeline.encoding.batch import Batch, padded_length
from data_pipeline.media.pixel_budget import SLICE_BYTES
from model.image_constants import MERGE_SIZE
from training.config import RunConfig

AROUND_AN_IMAGE = 2  # its begin and end tokens
TEXT = 16  # tokens of text beside an image of an assumed pack that is full of images
ASSUMED_SAMPLE = 2048  # tokens of a sample of an assumed typical pack, half of them of images


@dataclass(frozen=True)
class PackShape:
    """The segments of a pack: their lengths, and the patches of their images."""

    lengths: tuple[int, ...]  # tokens of each segment, image tokens included
    images: tuple[tuple[int, ...], ...]  # for each segment, patches of each image and frame pair

    @property
    def patches(self) -> list[int]:
        """Patches of every image and frame pair."""
        return [n for images in self.images for n in images]

    def within(self, seq_length: int, segment_multiple: int) -> PackShape:
        """Return what of it fits a pack whose segments are padded to other multiples: the last images are smaller."""
        lengths, images, used = [], [], 0
        for length, of_segment in zip(self.lengths, self.images, strict=True):
            room = seq_length - used
            if room <= 0:
                break
            kept, excess = list(of_segment), length - room
            while excess > 0 and kept:
                tokens = kept.pop() // MERGE_SIZE**2
                if tokens > excess:
                    kept.append(MERGE_SIZE**2 * (tokens - excess))
                excess -= tokens
            lengths.append(min(length, room))
            images.append(tuple(kept))
            used += padded_length(lengths[-1], segment_multiple)
        return PackShape(tuple(lengths), tuple(images))

    def describe(self) -> str:
        """Return one line about it."""
        images = self.patches
        return (
            f"{len(self.lengths)} samples of {min(self.lengths):,} to {max(self.lengths):,} tokens, {len(images)} "
            f"images and frame pairs of {sum(images):,} patches"
        )


def typical_pack(seq_length: int) -> PackShape:
    """Return a pack of samples of 2,048 tokens, half of them of an image: assumed where there is no data."""
    samples = max(seq_length // ASSUMED_SAMPLE, 1)
    length = seq_length // samples
    return PackShape((length,) * samples, ((MERGE_SIZE**2 * (length // 2),),) * samples)


def pack_full_of_images(seq_length: int, image_max_tokens: int, segment_multiple: int) -> PackShape:
    """Return the pack with the most patches: images as large as the budget allows, and a few words beside each."""
    lengths, images, left = [], [], seq_length
    while left > TEXT + AROUND_AN_IMAGE:
        tokens = min(image_max_tokens, left - TEXT - AROUND_AN_IMAGE)
        lengths.append(tokens + TEXT + AROUND_AN_IMAGE)
        images.append((MERGE_SIZE**2 * tokens,))
        left -= padded_length(lengths[-1], segment_multiple)
    return PackShape(tuple(lengths), tuple(images))


def as_batch(
    shape: PackShape, seq_length: int, segment_multiple: int, image_token_id: int, device: torch.device | str
) -> Batch:
    """Return a pack of this shape, with its pixels on `device`."""
    input_ids, boundaries, grids = torch.zeros(seq_length, dtype=torch.int64), [0], []
    for length, images in zip(shape.lengths, shape.images, strict=True):
        at = boundaries[-1] + 1
        for patches in images:
            grids.append((1, *_grid(patches)))
            input_ids[at : at + patches // MERGE_SIZE**2] = image_token_id
            at += patches // MERGE_SIZE**2 + 1
        boundaries.append(min(boundaries[-1] + padded_length(length, segment_multiple), seq_length))
    tail = int(boundaries[-1] < seq_length)
    segments = len(shape.lengths) + tail
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    return Batch(
        input_ids=input_ids,
        labels=input_ids.clone(),
        loss_mask=torch.ones(seq_length),
        position_ids=torch.zeros(3, seq_length, dtype=torch.int64),
        cu_seqlens=torch.tensor(boundaries + [seq_length] * tail, dtype=torch.int32),
        segment_lengths=torch.tensor([*shape.lengths, *[0] * tail], dtype=torch.int32),
        segment_domains=["text"] * segments,
        patches=torch.empty(int(grid_thw.prod(1).sum()), SLICE_BYTES, dtype=torch.uint8, device=device),
        grid_thw=grid_thw,
        frames_per_image=torch.ones(len(grids), dtype=torch.int32),
        sample_ids=["planned"] * segments,
    )


def _grid(patches: int) -> tuple[int, int]:
    """Return even height and width of an image of these patches, as near to a square as they allow.

    >>> _grid(24), _grid(4096)
    ((4, 6), (64, 64))
    """
    quarter = patches // MERGE_SIZE**2
    height = next(h for h in range(int(quarter**0.5), 0, -1) if quarter % h == 0)
    return MERGE_SIZE * height, MERGE_SIZE * (quarter // height)


def segments_of(segments: Sequence[tuple[int, Sequence[int]]]) -> PackShape:
    """Return the shape of a pack from the length and the images of each of its segments.

    Images that do not fit a segment are omitted: they belong to later pieces of a sample that is split.
    """
    images: list[tuple[int, ...]] = []
    for length, patches in segments:
        used = [1]  # a token before each image
        for n in patches:
            used.append(used[-1] + n // MERGE_SIZE**2 + 1)
        images.append(tuple(n for n, end in zip(patches, used[1:], strict=True) if end - 1 <= length))
    return PackShape(tuple(length for length, _ in segments), tuple(images))


def packs_per_rank(config: RunConfig, processes: int) -> int:
    """Return the packs of a step on each data-parallel rank.

    Where the ranks do not share them evenly, as may be in reinforcement learning, some are empty.
    """
    multiple = config.parallel.micro_batch_multiple
    shares = config.parallel.data_parallel_size(processes) * multiple
    return -(-config.train.global_batch_size // shares) * multiple
