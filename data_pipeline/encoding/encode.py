"""One sample's record and bytes -> `EncodedSample`: the work a data worker does for every sample.

A sample that is longer than a pack is a `LongSample`: tokenised whole, once, then decoded piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat import DEFAULT_FORM
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.media.images import SLICE_BYTES, grid_of, image_patches, probe_image, resized_size
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.media.video import probe_video, video_geometry, video_patches
from data_pipeline.sample import Image, Sample, Video


def encode_record(
    record: dict[str, Any],
    images: Sequence[bytes],
    videos: Sequence[bytes],
    *,
    tokenizer: GlmTokenizer,
    budget: PixelBudget,
    sample_id: str = "",
    chat_form: str = DEFAULT_FORM,
) -> EncodedSample:
    """Builds, decodes and tokenises one sample. Raises BadSample naming what is wrong with it."""
    sample = build_sample(record, images=len(images), videos=len(videos), chat_form=chat_form)
    return encode_sample(sample, images, videos, tokenizer=tokenizer, budget=budget, sample_id=sample_id)


def encode_sample(
    sample: Sample,
    images: Sequence[bytes],
    videos: Sequence[bytes],
    *,
    tokenizer: GlmTokenizer,
    budget: PixelBudget,
    sample_id: str = "",
) -> EncodedSample:
    """The same for a Sample that is already built."""
    pictures = [image_patches(data, budget.image_max_tokens) for data in images]
    clips = [video_patches(data, budget.video_max_tokens) for data in videos]
    tokenized = tokenize(sample, tokenizer, [grid for _, grid in pictures], [layout for _, layout in clips])

    next_picture, next_clip = iter(pictures), iter(clips)
    slices = [torch.empty(0, SLICE_BYTES, dtype=torch.uint8)]
    for element in sample.elements:
        if isinstance(element, Image):
            slices.append(next(next_picture)[0])
        elif isinstance(element, Video):
            slices.append(next(next_clip)[0])
    return EncodedSample(
        sample_id=sample_id,
        domain=sample.domain,
        input_ids=tokenized.input_ids,
        loss=tokenized.loss,
        position_ids=rope_positions(tokenized.input_ids == tokenizer.image_id, tokenized.grids),
        patches=torch.cat(slices),
        grids=tokenized.grids,
        frames_per_image=tokenized.frames_per_image,
    )


@dataclass(frozen=True)
class _Medium:
    """A picture or clip that has not been decoded yet, and how it will be. images: one, or a clip's frame pairs."""

    data: bytes
    images: int
    slices: Callable[[bytes, int], tuple[torch.Tensor, Any]]
    max_tokens: int


class LongSample:
    """A sample of which pieces are wanted. Pictures and clips are measured by their headers, and decoded with the piece
    that they lie in: a document of a hundred pages is not decoded anew for each of its pieces.

    Raises BadSample naming what is wrong with the record or a header.
    """

    def __init__(
        self,
        sample: Sample,
        images: Sequence[bytes],
        videos: Sequence[bytes],
        *,
        tokenizer: GlmTokenizer,
        budget: PixelBudget,
        sample_id: str = "",
    ):
        self.sample, self.sample_id = sample, sample_id
        self._image_id = tokenizer.image_id
        grids = [grid_of(resized_size(*probe_image(data), max_tokens=budget.image_max_tokens)) for data in images]
        layouts = [video_geometry(probe_video(data), budget.video_max_tokens) for data in videos]
        self._tokens = tokenize(sample, tokenizer, grids, layouts)
        pictures = (_Medium(data, 1, image_patches, budget.image_max_tokens) for data in images)
        clips = (
            _Medium(data, len(layout.seconds), video_patches, budget.video_max_tokens)
            for data, layout in zip(videos, layouts, strict=True)
        )
        of_element: dict[type, Iterator[_Medium]] = {Image: pictures, Video: clips}
        self._media = [next(of_element[type(part)]) for part in sample.elements if isinstance(part, Image | Video)]

    def __len__(self) -> int:
        return len(self._tokens.input_ids)

    def piece(self, start: int, length: int) -> EncodedSample:
        """Tokens start..start+length as a sample of its own, with positions from 0. Raises BadSample if a picture or
        clip lies only partly within, or cannot be decoded."""
        end = start + length
        begins, lengths = np.array(self._tokens.blocks, dtype=np.int64).reshape(-1, 2).T
        ends = begins + lengths
        if ((begins < start) & (start < ends) | (begins < end) & (end < ends)).any():
            raise BadSample("media_cut", f"a picture or clip does not lie wholly within tokens {start} to {end}")
        inside = np.flatnonzero((begins >= start) & (ends <= end))
        media = [self._media[number] for number in inside]
        before = sum(medium.images for medium in self._media[: inside[0]]) if len(inside) else 0
        images = slice(before, before + sum(medium.images for medium in media))
        grids, frames_per_image = self._tokens.grids[images], self._tokens.frames_per_image[images]
        patches = [medium.slices(medium.data, medium.max_tokens)[0] for medium in media]
        slices = torch.cat([torch.empty(0, SLICE_BYTES, dtype=torch.uint8), *patches])
        if len(slices) != sum(h * w * instants for (h, w), instants in zip(grids, frames_per_image, strict=True)):
            raise BadSample("media_mismatch", "a picture or clip has another size than its header says")
        input_ids = self._tokens.input_ids[start:end]
        return EncodedSample(
            sample_id=self.sample_id,
            domain=self.sample.domain,
            input_ids=input_ids,
            loss=self._tokens.loss[start:end],
            position_ids=rope_positions(input_ids == self._image_id, grids),
            patches=slices,
            grids=grids,
            frames_per_image=frames_per_image,
        )
